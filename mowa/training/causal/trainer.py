"""A language model, made somebody's own: instruction tuning and continued pretraining, with TRL's stock `SFTTrainer`.

Batches are planned before the first step, packed end to end, and the same again when a run that was broken off goes on.
What is learnt of which rows `texts` knows; how the net is made faster, `families.accelerate`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from mowa import hardware
from mowa.adapters import freeze, lora
from mowa.data.chat.tokenize import TokenizedSample
from mowa.errors import MissingDependency, RecipeError, TrainingStopped
from mowa.io.atomic import atomic_write, read_json
from mowa.models.causal import accelerate, fused_modules
from mowa.models.causal.accelerate import Change
from mowa.tasks import causal
from mowa.training import checkpoints, optimizer, trainer_args
from mowa.training.causal import batches as bins
from mowa.training.causal import dataset
from mowa.training.causal.dataset import CausalSplits, evaluate
from mowa.training.causal.save import save_run
from mowa.training.config.causal import CausalRecipe
from mowa.training.ctc.save import DONE_MARKER
from mowa.training.ctc.setup import MIN_EVAL_STEPS, is_main_process
from mowa.training.distributed import launch
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from mowa.training.monitor import callbacks, progress
from mowa.types import IGNORE_INDEX, Family, LanguageModel

REQUIRED_PACKAGES = ("accelerate", "datasets", "matplotlib", "peft", "trl")
PRETRAINED_LR, LORA_LR = 1e-5, 2e-4  # for weights that were trained already, and for new ones


@dataclass(frozen=True, slots=True)
class CausalRun:
    """What was made ready: everything the Trainer is given."""

    recipe: CausalRecipe
    model: LanguageModel  # its net as it learns
    splits: CausalSplits
    max_steps: int
    eval_steps: int
    batches: list[list[int]]  # indices into texts.train


def train_causal(recipe: CausalRecipe, model: LanguageModel, output_dir: Path, *, threads: int | None = None) -> Path:
    """Tune `model` as `plan` says; the finished checkpoint, or the adapter's folder, is `out`. → out.

    `model.net` is changed in place. RecipeError where `out` holds a run by another recipe; DataError where nothing is
    left to learn from; TrainingStopped where a sentinel saw that nothing would come of it.
    """
    installed = hardware.optional_package_versions()
    if missing := [name for name in REQUIRED_PACKAGES if installed[name] is None]:
        raise MissingDependency(f"tuning language models needs {', '.join(missing)}: pip install 'mowa[text]'")
    torch.set_num_threads(threads or hardware.cpu_count())
    set_seed(recipe.optimizer.seed)
    trainer_args.lock_run_dir(recipe, output_dir / "run" / "recipe.yaml")
    if (output_dir / "run" / DONE_MARKER).is_file():
        print(f"{output_dir}: finished before", file=sys.stderr)
        return output_dir
    run = prepare(recipe, model)
    net = run.model.net
    resumed = checkpoints.find_last_checkpoint(output_dir / "run")
    began = time.time()
    shared = launch.is_worker_process() and torch.cuda.is_available()  # no GPU may have room for all of the net
    if torch.cuda.is_available() and not shared:
        net.to("cuda")
    before = {} if shared else evaluate_baseline(run, output_dir / "run" / "before.json")
    alone = None if shared else evaluate(net, select_short_samples(run.splits.train))
    with lora.suppress_peft_warnings():
        trainer, live = build_trainer(run, output_dir, resumed)
    changes = accelerate.accelerate(net, mlp_tiles=recipe.memory.mlp_tiles) if recipe.memory.accelerate else ()
    try:
        _log_plan(run, changes, resumed)
        if alone is not None:
            verify_packing(run, alone)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        lost = evaluate_loss(trainer, next(iter(trainer.eval_dataset.values())))["loss"]
    finally:
        live.close()
        accelerate.restore(net)
    save_run(recipe, run.model, run.splits, trainer, output_dir, time.time() - began, before, lost)
    return output_dir


def prepare(recipe: CausalRecipe, model: LanguageModel) -> CausalRun:
    """Texts read and shown, what learns marked, batches planned."""
    limits = model.family.unsupported
    why = limits.get("packing") or ("" if recipe.memory.accelerate else limits.get("packing_unaccelerated"))
    if recipe.batch.packing and why:
        raise RecipeError(f"batch: layout: packed: {model.family.name}: {why}; use padded")
    found = dataset.load_splits(recipe, model)
    net = model.net
    if recipe.method == "lora":
        low = recipe.lora
        net = lora.get_peft_model(
            net,
            model.family,
            rank=low.rank,
            alpha=low.alpha,
            dropout=low.dropout,
            target_modules=low.target_modules,
            variant=low.variant,
        )
    else:
        set_trainable(net, model.family, recipe)
    if recipe.optimizer.gradient_checkpointing:
        set_gradient_checkpointing(net)
    if recipe.memory.activation_offload:
        fused_modules.set_activation_offload(net)
    together = recipe.batch.gradient_accumulation_steps * recipe.distributed.devices * recipe.distributed.nodes
    batches = bins.plan_batches(
        [len(row) for row in found.train],
        max_tokens=recipe.batch.tokens,
        packing=recipe.batch.packing,
        epochs=recipe.optimizer.epochs,
        num_batches=recipe.optimizer.max_steps * together,
        multiple_of=together,
        seed=recipe.optimizer.seed,
    )
    steps = len(batches) // together
    every = recipe.evaluation.eval_steps or max(MIN_EVAL_STEPS, -(-steps // 10))
    tuned = LanguageModel(net, model.family, model.origin, model.tokenizer)
    return CausalRun(recipe, tuned, found, steps, min(every, steps), batches)


def resolve_base_dtype(recipe: CausalRecipe, folder: Path) -> str:
    """What the weights of the checkpoint in `folder` are loaded as: float32 if they learn, else as the run computes."""
    if recipe.memory.base_scheme != "auto" or recipe.method != "lora":
        return {"bf16": "bfloat16"}.get(recipe.memory.base_scheme, "float32")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return "bfloat16" if launch.resolve_precision(recipe, config) == "bf16" else "float32"


def set_trainable(net: Any, family: Family, plan: CausalRecipe) -> None:
    """Mark what learns: everything, or the topmost blocks with the norm after them. RecipeError: too few blocks."""
    net.requires_grad_(plan.top_n is None)
    if plan.top_n is None:
        return
    blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
    if plan.top_n > len(blocks):
        raise RecipeError(f"train: {plan.method}: the net has {len(blocks)} blocks; top-{len(blocks)} at most, or all")
    for block in blocks[-plan.top_n :]:
        block.requires_grad_(True)
    net.base_model.norm.requires_grad_(True)


def collate(run: CausalRun, samples: Sequence[TokenizedSample], packing: bool) -> dict[str, Tensor]:
    return causal.pack(samples) if packing else causal.pad(samples, pad_token_id(run.model.tokenizer))


def pad_token_id(tokenizer: Any) -> int:
    """What padding is made of. Nobody sees it: it is masked by its place."""
    found = tokenizer.pad_token_id
    return int(found if found is not None else tokenizer.eos_token_id or 0)


def build_trainer(run: CausalRun, output_dir: Path, resume_from: Path | None) -> tuple[Any, progress.ProgressReporter]:
    """TRL's trainer, with what it is given: our batches, optimiser and callbacks."""
    import datasets

    plan, model, found = run.recipe, run.model, run.splits
    rows = {"train": found.train} | found.dev | found.test
    layout = plan.batch.packing

    def collate_planned(items: list[dict[str, Any]]) -> dict[str, Any]:
        (item,) = items
        chosen = [rows[item["set"]][index] for index in item["rows"]]
        return collate(run, chosen, layout) | {"number": torch.tensor([item["number"]])}

    def listed(name: str, batches: list[list[int]]) -> Any:
        numbers = list(range(len(batches)))
        return datasets.Dataset.from_dict({"set": [name] * len(batches), "rows": batches, "number": numbers})

    measured = {name: listed(name, _one_pass(run, part)) for name, part in found.dev.items()}
    sentinels = callbacks.Monitor(plan.monitors, output_dir, model.net)
    live = progress.ProgressReporter(
        0, [sum(len(found.train[index]) for index in batch) for batch in run.batches], unit="tokens"
    )

    def seen(loss: float, number: int) -> None:
        names = [found.train[index].id for index in run.batches[number]]
        sentinels.on_causal_batch(trainer.state.global_step, loss, names)

    trainer = _trainer_class()(
        plan,
        model.family,
        seen,
        model=model.net,
        args=_arguments(run, output_dir),
        data_collator=collate_planned,
        train_dataset=listed("train", run.batches),
        eval_dataset=measured,
        processing_class=model.tokenizer,
    )
    trainer_args.attach_callbacks(trainer, plan, sentinels, live)
    if is_main_process():
        for finding in found.findings:
            sentinels.report(finding)
    return trainer, live


def _one_pass(run: CausalRun, rows: Sequence[TokenizedSample]) -> list[list[int]]:
    return bins.plan_eval_batches([len(row) for row in rows], run.recipe.batch.tokens, run.recipe.batch.packing)


def _trainer_class() -> Any:
    """TRL's SFTTrainer with our optimiser, and a measurement that weighs tokens, not batches. TRL is slow to load."""
    from trl import SFTTrainer

    class Taught(optimizer.OptimizerMixin, SFTTrainer):
        def __init__(
            self, plan: CausalRecipe, family: Family, seen: Callable[[float, int], None], **settings: Any
        ) -> None:
            super().__init__(**settings)
            self.recipe, self.family, self.seen = plan, family, seen

        def groups(self, net: nn.Module) -> list[dict[str, Any]]:
            return optimizer.build_param_groups(
                net, self.family, self.recipe.optimise, resolve_learning_rate(self.recipe)
            )

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            number = int(inputs.pop("number"))
            learnt = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if model.training:
                alone = loss[0] if return_outputs else loss
                times = 1.0 if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
                self.seen(float(alone.detach() * times / learnt.clamp(min=1)), number)
            return loss

        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            sets = self.eval_dataset if eval_dataset is None else eval_dataset
            if isinstance(sets, dict):
                metrics: dict[str, float] = {}
                for name, part in sets.items():
                    metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                return metrics
            began = time.time()
            found = evaluate_loss(self, sets)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            metrics[f"{metric_key_prefix}_runtime"] = time.time() - began
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Taught


def evaluate_loss(trainer: Any, batches: Any) -> dict[str, float]:
    """Loss (nats a token) and accuracy over every learnt token of `batches`, on all devices together."""
    net = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    training = net.training
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(batches):
            batch.pop("number")
            inputs = {name: value.to(trainer.args.device) for name, value in batch.items()}
            with trainer.compute_loss_context_manager():
                out = net(**inputs, use_cache=False, fused_lm_head=True)
            parts = [out.log_probs.double().sum(), out.is_top1.double().sum(), out.label_mask.double().sum()]
            sums += trainer.accelerator.gather_for_metrics(torch.stack(parts)[None]).sum(0).cpu()
    net.train(training)
    lost, right, count = sums.tolist()
    return {"loss": -lost / max(1.0, count), "accuracy": right / max(1.0, count)}


def resolve_learning_rate(plan: CausalRecipe) -> float:
    """The learning rate, as given or as suits what learns."""
    return plan.optimizer.learning_rate or (LORA_LR if plan.method == "lora" else PRETRAINED_LR)


def _arguments(run: CausalRun, out: Path) -> Any:
    from trl import SFTConfig

    settings = trainer_args.training_arguments(
        run.recipe, out, run.model.net, max_steps=run.max_steps, eval_steps=run.eval_steps
    )
    settings |= {
        "gradient_checkpointing": False,  # `ready` has seen to it
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{next(iter(run.splits.dev))}_loss",
    }
    return SFTConfig(**settings)


def evaluate_baseline(run: CausalRun, cache_file: Path) -> dict[str, dict[str, float]]:
    """What the checkpoint makes of the sets it is measured on before it learns; kept for a run that goes on."""
    if cache_file.is_file():
        kept: dict[str, dict[str, float]] = read_json(cache_file)
        return kept
    found = {name: evaluate(run.model.net, rows) for name, rows in (run.splits.dev | run.splits.test).items()}
    if is_main_process():
        atomic_write(cache_file, json.dumps(found))
    return found


def select_short_samples(rows: Sequence[TokenizedSample]) -> list[TokenizedSample]:
    """Up to four short examples."""
    return sorted(rows, key=len)[: max(4, len(rows) // 4)][-4:]


def verify_packing(run: CausalRun, unpacked: dict[str, float]) -> None:
    """A few examples packed must lose what they lost one by one by the stock net, `alone`. TrainingStopped if not."""
    net = run.model.net
    batch = collate(run, select_short_samples(run.splits.train), run.recipe.batch.packing)
    with torch.no_grad():
        out = net(**{name: value.to(net.device) for name, value in batch.items()}, fused_lm_head=True)
    lost = -float(out.log_probs.double().sum()) / max(1.0, unpacked["tokens"])
    exact = next(net.parameters()).dtype == torch.float32
    if abs(lost - unpacked["loss"]) > (1e-4 if exact else 2e-2) * max(1.0, unpacked["loss"]):
        raise TrainingStopped(
            f"packed and faster, a few examples lose {lost:.5f} nats a token; alone {unpacked['loss']:.5f}: "
            "something is wrong with this net.\n  Try memory.accelerate: false and batch.layout: padded, and tell us "
            "which model this is"
        )


def _log_plan(run: CausalRun, changes: Sequence[Change], resumed: Path | None) -> None:
    """What will happen, before it does: what was left out, what is learnt of it, what learns, for how long."""
    if not is_main_process():
        return
    found = run.splits
    lines = [*found.notes, found.preview] if resumed is None else []
    lines.append(freeze.format_table(freeze.count_parameters(run.model.net, run.model.family)))
    lines += [str(change) for change in changes]
    tokens = sum(len(found.train[index]) for batch in run.batches for index in batch)
    lines.append(f"{run.max_steps} steps over {tokens:,} tokens, measured every {run.eval_steps}")
    if resumed:
        lines.append(f"going on from {resumed.name}")
    print("\n".join(lines), file=sys.stderr)
