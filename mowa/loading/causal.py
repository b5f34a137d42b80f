"""A causal checkpoint → a `LanguageModel`: the stock transformers net and its tokenizer, which have to fit each other.

What is asked of the model, and how its words are chosen, is not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mowa.errors import ModelError
from mowa.families import resolve_family as resolve_family
from mowa.io.atomic import read_json
from mowa.io.hub import resolve_model, silence_transformers
from mowa.loading import checkpoint
from mowa.loading.checkpoint import validate_device, validate_dtype
from mowa.types import Family, LanguageModel


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
) -> LanguageModel:
    """Load a causal language model by folder or hub id, in eval mode, with no gradients, on `device` in `dtype`.

    Raises ModelError: an unknown name, family or dtype; a model of another task; config, weights or tokenizer that are
    missing, damaged or do not fit each other; a device that is not there. HubUnreachable as `files.resolve` does.
    """
    validate_dtype(dtype)
    validate_device(device)
    origin = resolve_model(name, revision=revision, offline=offline, validate=read_causal_family)
    read_causal_family(origin.folder)  # a folder is not vetted by `resolve`
    family = resolve_family(origin.source, read_json(origin.folder / "config.json"))
    tokenizer = load_tokenizer(origin.folder)
    net = _net(origin.folder, family, dtype)
    validate_tokenizer(tokenizer, net, origin.name)
    return LanguageModel(net=net.to(device), family=family, origin=origin, tokenizer=tokenizer)


def read_causal_family(folder: Path) -> Family:
    """The family that `folder`'s config.json names; ModelError if mowa has none, or it is of another task."""
    family = checkpoint.read_family(folder)
    if family.task != "causal":
        kind = "hears" if family.task == "ctc" else f"is for {family.task}"
        raise ModelError(f"{folder} is a {family.name} model, which {kind}: name a causal language model")
    return family


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; ModelError where there is none, or it is damaged. No code of the folder's is run."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer: tokenizer.json, or tokenizer.model, belongs beside the weights")
    with silence_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"the tokenizer of {folder} cannot be read: {reason}") from error


def validate_tokenizer(tokenizer: Any, net: Any, name: str) -> None:
    """ModelError where the tokenizer has ids that the net has no embedding for: it is another model's."""
    rows, highest = net.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {name} has ids up to {highest} and the model embeds {rows}: it is another model's, or "
            "tokens were added to it and not to the model"
        )


def _net(folder: Path, family: Family, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    net, report = checkpoint.load_net(AutoModelForCausalLM, folder, family, dtype)
    checkpoint.validate_loading_info(folder, net.base_model_prefix, report)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        net.generation_config = GenerationConfig.from_pretrained(folder)
    return net.eval().requires_grad_(False)
