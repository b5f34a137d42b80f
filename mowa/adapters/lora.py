"""LoRA (arXiv:2106.09685) by PEFT, injected into the modules of a net, and merged back into its weights.

    y = W x + b + alpha / rank · B A x,     A random, B = 0

A speech model stays the transformers module that it was: `net.config`, `net.lm_head` and the blocks keep their names.
Its head has no LoRA; it is trained in full, and `checkpoint` saves it whole (PEFT's `modules_to_save`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mowa.adapters.embeddings import complete_wrappers, merge_trained_modules, missing_modules
from mowa.errors import MissingDependency, RecipeError
from mowa.types import Family

ADAPTER_NAME = "default"  # PEFT's default name
ALL_LINEAR = "all-linear"  # every group of `Family.linears`


def import_peft() -> Any:
    """Import PEFT. Raises MissingDependency if it is not installed."""
    try:
        import peft
    except ImportError:
        raise MissingDependency("LoRA needs peft: pip install 'mowa[train]'") from None
    return peft


def has(net: Any) -> bool:
    """Return whether `net` has LoRA layers."""
    return bool(getattr(net, "peft_config", None))


def add(
    net: Any,
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("attention",),
    variant: str = "lora",
) -> Any:
    """Add LoRA of `rank`, scaled by alpha / rank, to the linear layers of every block, in place, and return `net`.

    `target_modules` are groups of `family.linears` (attention, mlp), or all-linear for all of them; mlp beside another
    group is ignored where the MLPs are experts. `variant` is lora, rslora (arXiv:2312.03732) or dora
    (arXiv:2402.09353). `dropout` applies to the input of A in training. A is drawn from torch's generator. All other
    parameters are frozen; `freeze.set_trainable` unfreezes the head.

    Raises RecipeError for unknown or unsupported target modules and for a net that has LoRA, MissingDependency without
    PEFT.
    """
    settings = lora_config(
        family, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, variant=variant
    )
    if has(net):
        raise RecipeError("lora: this model has LoRA already: merge the adapter first, or start from its base model")
    net = import_peft().inject_adapter_in_model(settings, net, ADAPTER_NAME)
    for module in net.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # autocast does the casts
            module.cast_input_dtype_enabled = False
    return net


def get_peft_model(
    net: Any,
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    variant: str,
    modules_to_save: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
    token_ids: Sequence[int] = (),
) -> Any:
    """Wrap a causal net in a PeftModel, in which only what the adapter holds is trainable. Raises as `add`.

    Beside LoRA of linear layers these are `modules_to_save`, trained in full, LoRA of the experts' tensors named by
    `target_parameters`, and the rows `token_ids` of embeddings and head, unless those are trained in full. What is tied
    stays tied.
    transformers' and TRL's trainers save only the adapter of a PeftModel in their checkpoints.
    """
    if has(net):
        raise RecipeError("lora: this model has LoRA already: merge the adapter first, or start from its base model")
    peft = import_peft()
    settings = lora_config(
        family,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        variant=variant,
        task_type="CAUSAL_LM",
    )
    _validate_extra_targets(net, modules_to_save, target_parameters, plain=not dropout and variant != "dora")
    tied = bool(net.config.get_text_config().tie_word_embeddings)
    settings.modules_to_save = list(modules_to_save) or None
    settings.target_parameters = list(target_parameters) or None
    settings.ensure_weight_tying = tied and bool(modules_to_save)
    settings.trainable_token_indices = _trained_rows(net, modules_to_save, token_ids, tied) or None
    if taken := _taken_for_experts(settings, net):
        if ALL_LINEAR not in target_modules:
            raise RecipeError(
                f"lora: target_modules: mlp: PEFT takes {', '.join(sorted(taken))} of {family.name} for its experts,"
                " not its MLPs; use [attention], or name experts in lora: target_parameters"
            )
        settings.target_modules -= taken
    if token_ids:
        net.name_or_path = ""  # else PEFT compares sizes with the base, and writes all embeddings into checkpoints
    with suppress_peft_warnings():
        wrapped = peft.get_peft_model(net, settings)
    complete_wrappers(wrapped)
    return wrapped


def _validate_extra_targets(
    net: Any, modules_to_save: Sequence[str], target_parameters: Sequence[str], *, plain: bool
) -> None:
    """Raise RecipeError for names that the net lacks, and for LoRA of tensors that is not `plain`."""
    if absent := missing_modules(net, modules_to_save):
        raise RecipeError(
            f"lora: modules_to_save: the model has no module {absent[0]!r}; name those such as embed_tokens"
        )
    names = {name.rpartition(".")[2] for name, _ in net.named_parameters()}
    if absent := [name for name in target_parameters if name.rpartition(".")[2] not in names]:
        raise RecipeError(
            f"lora: target_parameters: the model has no parameter {absent[0]!r}; name those such as experts.down_proj"
        )
    if target_parameters and not plain:
        raise RecipeError("lora: target_parameters: PEFT supports neither dropout nor dora there; leave them out")


def unfreeze(net: Any) -> None:
    """Make the adapter of `net`, a PeftModel, trainable, in float32 as PEFT trains it, and nothing else."""
    net.set_adapter(ADAPTER_NAME)
    net.peft_config[ADAPTER_NAME].inference_mode = False
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _trained_rows(
    net: Any, modules_to_save: Sequence[str], token_ids: Sequence[int], tied: bool
) -> dict[str, list[int]]:
    """Return module → rows to train, for embeddings and head where they are not trained in full."""
    parts = [net.get_input_embeddings()] + ([] if tied else [net.get_output_embeddings()])
    names = [name.rpartition(".")[2] for part in parts for name, module in net.named_modules() if module is part]
    return {name: list(token_ids) for name in names if token_ids and name not in modules_to_save}


def _taken_for_experts(settings: Any, net: Any) -> set[str]:
    """Return the target modules that PEFT takes for those of checkpoints written before transformers 5.

    In those, experts were linear layers of these names; PEFT adds LoRA to the experts' tensors in their place, when the
    adapter is created and when it is loaded.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = set()
    for name in settings.target_modules:
        alone = copy.copy(settings)
        alone.target_modules, alone.target_parameters = {name}, None
        try:
            convert_peft_config_for_transformers(alone, net, None)
        except ValueError:  # it is one of several that are one tensor now
            taken.add(name)
        if name not in alone.target_modules:
            taken.add(name)
    return taken


def load_peft_model(net: Any, folder: Path, **options: Any) -> Any:
    """Wrap `net` in a PeftModel with the adapter in `folder`."""
    with suppress_peft_warnings():
        loaded = import_peft().PeftModel.from_pretrained(net, folder, **options)
    complete_wrappers(loaded)
    return loaded


def merge_and_unload(net: Any, dtype: Any = None) -> None:
    """Replace every LoRA layer of `net` by a linear layer with merged weights, in `dtype` or that of the layer.

    Unlike PEFT's method of this name, it changes `net` in place and writes to no existing tensor, which other nets may
    share. Sums are computed in float64 and rounded once.
    """
    lora_layer = import_peft().tuners.lora.LoraLayer
    merge_trained_modules(net, dtype)
    done: list[str] = []  # layers of experts are nested, one for each tensor
    for name, module in [(name, module) for name, module in net.named_modules() if isinstance(module, lora_layer)]:
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        done.append(name)
        base = module.get_base_layer()
        weight_dtype = dtype or next(weight for weight in base.parameters() if weight.is_floating_point()).dtype
        merged: Any = copy.deepcopy(module).double()
        nested = merged
        while isinstance(nested, lora_layer):
            nested.merge(safe_merge=True)
            nested = nested.base_layer
        net.set_submodule(name, nested.to(weight_dtype).requires_grad_(False))


@contextmanager
def suppress_peft_warnings() -> Iterator[None]:
    """Suppress transformers' FutureWarning about an attribute that PEFT and TRL still use, and PEFT's about Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # `merge_and_unload` unties them
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # it depends on the layer, and PEFT sets it
        yield


def lora_config(
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    variant: str,
    task_type: str | None = None,
) -> Any:
    """Build PEFT's LoraConfig. Raises RecipeError for unknown or unsupported target modules."""
    return import_peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(_linear_names(family, target_modules)),
        bias="none",
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        task_type=task_type,
    )


def _linear_names(family: Family, target_modules: Sequence[str]) -> set[str]:
    if not target_modules:
        raise RecipeError(f"lora: target_modules: at least one is needed ({', '.join(family.linears)})")
    if ALL_LINEAR in target_modules:
        target_modules = tuple(family.linears)
    for group in target_modules:
        if group in family.linears:
            continue
        if group == "attention":
            raise RecipeError(
                f"lora: target_modules: attention: {family.name} passes the raw weights of its attention to a torch"
                f" function, which bypasses LoRA; use target_modules: [{', '.join(family.linears)}]"
            )
        if group == "mlp" and "experts" in family.unsupported:
            if len(target_modules) > 1:
                continue
            raise RecipeError(
                f"lora: target_modules: mlp: {family.unsupported['experts']}; use [all-linear], which is"
                f" {', '.join(family.linears)} of {family.name}"
            )
        raise RecipeError(f"lora: target_modules: {group!r}: {family.name} has {', '.join(family.linears)}")
    return {name for group in target_modules for name in family.linears.get(group, ())}
