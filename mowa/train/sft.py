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

from mowa import machine
from mowa.adapt import freeze, lora
from mowa.data.chat import Tokens
from mowa.errors import MissingPart, RecipeError, TrainingStopped
from mowa.families import accelerate, patch, swaps
from mowa.families.accelerate import Change
from mowa.files import atomic_write, read_json
from mowa.nouns import IGNORED, Family, LanguageModel
from mowa.tasks import causal
from mowa.train import bins, checkpoints, optimiser, parallel, texts, trainers, view, watch
from mowa.train.finish import DONE
from mowa.train.instruct import Instruction
from mowa.train.ready import LEAST_APART, first
from mowa.train.texts import Texts, measure
from mowa.train.written import finish

NEEDED = ("accelerate", "datasets", "matplotlib", "peft", "trl")
GENTLE, BOLD = 1e-5, 2e-4  # for weights that were trained already, and for new ones


@dataclass(frozen=True, slots=True)
class Run:
    """What was made ready: everything the Trainer is given."""

    plan: Instruction
    model: LanguageModel  # its net as it learns
    texts: Texts
    steps: int
    every: int
    batches: list[list[int]]  # indices into texts.train


def instruct(plan: Instruction, model: LanguageModel, out: Path, *, threads: int | None = None) -> Path:
    """Tune `model` as `plan` says; the finished checkpoint, or the adapter's folder, is `out`. → out.

    `model.net` is changed in place. RecipeError where `out` holds a run by another recipe; DataError where nothing is
    left to learn from; TrainingStopped where a sentinel saw that nothing would come of it.
    """
    installed = machine.parts()
    if missing := [name for name in NEEDED if installed[name] is None]:
        raise MissingPart(f"tuning language models needs {', '.join(missing)}: pip install 'mowa[text]'")
    torch.set_num_threads(threads or machine.cores())
    set_seed(plan.optimise.seed)
    trainers.claim(plan, out / "run" / "recipe.yaml")
    if (out / "run" / DONE).is_file():
        print(f"{out}: finished before", file=sys.stderr)
        return out
    run = ready(plan, model)
    net = run.model.net
    resumed = checkpoints.last(out / "run")
    began = time.time()
    shared = parallel.inside() and torch.cuda.is_available()  # no GPU may have room for all of the net
    if torch.cuda.is_available() and not shared:
        net.to("cuda")
    before = {} if shared else measured_before(run, out / "run" / "before.json")
    alone = None if shared else measure(net, few(run.texts.train))
    with lora.hushed():
        trainer, live = trainer_of(run, out, resumed)
    changes = accelerate.accelerate(net, tiles=plan.memory.tiles) if plan.memory.accelerate else ()
    try:
        _say(run, changes, resumed)
        if alone is not None:
            check_packing(run, alone)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        lost = totals(trainer, next(iter(trainer.eval_dataset.values())))["loss"]
    finally:
        live.close()
        accelerate.restore(net)
    finish(plan, run.model, run.texts, trainer, out, time.time() - began, before, lost)
    return out


def ready(plan: Instruction, model: LanguageModel) -> Run:
    """Texts read and shown, what learns marked, batches planned."""
    limits = model.family.limits
    why = limits.get("packing") or ("" if plan.memory.accelerate else limits.get("packing_unaccelerated"))
    if plan.batch.layout == "packed" and why:
        raise RecipeError(f"batch: layout: packed: {model.family.name}: {why}; use padded")
    found = texts.gather(plan, model)
    net = model.net
    if plan.train == "lora":
        low = plan.lora
        net = lora.wrapped(
            net, model.family, rank=low.rank, alpha=low.alpha, dropout=low.dropout, where=low.where, kind=low.kind
        )
    else:
        learn(net, model.family, plan)
    if plan.optimise.checkpointing:
        patch.checkpoint_blocks(net)
    if plan.memory.offload:
        swaps.offload_blocks(net)
    together = plan.batch.accumulate * plan.parallel.devices * plan.parallel.nodes
    batches = bins.plan(
        [len(row) for row in found.train],
        room=plan.batch.tokens,
        layout=plan.batch.layout,
        epochs=plan.optimise.epochs,
        count=plan.optimise.steps * together,
        multiple=together,
        seed=plan.optimise.seed,
    )
    steps = len(batches) // together
    every = plan.evaluate.every or max(LEAST_APART, -(-steps // 10))
    tuned = LanguageModel(net, model.family, model.origin, model.tokenizer)
    return Run(plan, tuned, found, steps, min(every, steps), batches)


def base_dtype(plan: Instruction, folder: Path) -> str:
    """What the weights of the checkpoint in `folder` are loaded as: float32 if they learn, else as the run computes."""
    if plan.memory.base != "auto" or plan.train != "lora":
        return {"bf16": "bfloat16"}.get(plan.memory.base, "float32")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return "bfloat16" if parallel.precision_of(plan, config) == "bf16" else "float32"


def learn(net: Any, family: Family, plan: Instruction) -> None:
    """Mark what learns: everything, or the topmost blocks with the norm after them. RecipeError: too few blocks."""
    net.requires_grad_(plan.top is None)
    if plan.top is None:
        return
    blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
    if plan.top > len(blocks):
        raise RecipeError(f"train: {plan.train}: the net has {len(blocks)} blocks; top-{len(blocks)} at most, or all")
    for block in blocks[-plan.top :]:
        block.requires_grad_(True)
    net.base_model.norm.requires_grad_(True)


def collated(run: Run, rows: Sequence[Tokens], layout: str) -> dict[str, Tensor]:
    return causal.pack(rows) if layout == "packed" else causal.pad(rows, filler(run.model.tokenizer))


def filler(tokenizer: Any) -> int:
    """What padding is made of. Nobody sees it: it is masked by its place."""
    found = tokenizer.pad_token_id
    return int(found if found is not None else tokenizer.eos_token_id or 0)


def trainer_of(run: Run, out: Path, resumed: Path | None) -> tuple[Any, view.Live]:
    """TRL's trainer, with what it is given: our batches, optimiser and callbacks."""
    import datasets

    plan, model, found = run.plan, run.model, run.texts
    rows = {"train": found.train} | found.dev | found.test
    layout = plan.batch.layout

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        (item,) = items
        chosen = [rows[item["set"]][index] for index in item["rows"]]
        return collated(run, chosen, layout) | {"number": torch.tensor([item["number"]])}

    def listed(name: str, batches: list[list[int]]) -> Any:
        numbers = list(range(len(batches)))
        return datasets.Dataset.from_dict({"set": [name] * len(batches), "rows": batches, "number": numbers})

    measured = {name: listed(name, _one_pass(run, part)) for name, part in found.dev.items()}
    sentinels = watch.Sentinels(plan.watch, out, model.net)
    live = view.Live(0, [sum(len(found.train[index]) for index in batch) for batch in run.batches], unit="tokens")

    def seen(loss: float, number: int) -> None:
        names = [found.train[index].id for index in run.batches[number]]
        sentinels.texts(trainer.state.global_step, loss, names)

    trainer = _class()(
        plan,
        model.family,
        seen,
        model=model.net,
        args=_arguments(run, out),
        data_collator=collate,
        train_dataset=listed("train", run.batches),
        eval_dataset=measured,
        processing_class=model.tokenizer,
    )
    trainers.follow(trainer, plan, sentinels, live)
    if first():
        for finding in found.findings:
            sentinels.tell(finding)
    return trainer, live


def _one_pass(run: Run, rows: Sequence[Tokens]) -> list[list[int]]:
    return bins.one_pass([len(row) for row in rows], run.plan.batch.tokens, run.plan.batch.layout)


def _class() -> Any:
    """TRL's SFTTrainer with our optimiser, and a measurement that weighs tokens, not batches. TRL is slow to load."""
    from trl import SFTTrainer

    class Taught(optimiser.OwnOptimiser, SFTTrainer):
        def __init__(
            self, plan: Instruction, family: Family, seen: Callable[[float, int], None], **settings: Any
        ) -> None:
            super().__init__(**settings)
            self.tuning, self.family, self.seen = plan, family, seen

        def groups(self, net: nn.Module) -> list[dict[str, Any]]:
            return optimiser.groups(net, self.family, self.tuning.optimise, rate(self.tuning))

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            number = int(inputs.pop("number"))
            learnt = (inputs["labels"][:, 1:] != IGNORED).sum()
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
            found = totals(self, sets)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            metrics[f"{metric_key_prefix}_runtime"] = time.time() - began
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Taught


def totals(trainer: Any, batches: Any) -> dict[str, float]:
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


def rate(plan: Instruction) -> float:
    """The learning rate, as given or as suits what learns."""
    return plan.optimise.learning_rate or (BOLD if plan.train == "lora" else GENTLE)


def _arguments(run: Run, out: Path) -> Any:
    from trl import SFTConfig

    settings = trainers.arguments(run.plan, out, run.model.net, steps=run.steps, every=run.every)
    settings |= {
        "gradient_checkpointing": False,  # `ready` has seen to it
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{next(iter(run.texts.dev))}_loss",
    }
    return SFTConfig(**settings)


def measured_before(run: Run, note: Path) -> dict[str, dict[str, float]]:
    """What the checkpoint makes of the sets it is measured on before it learns; kept for a run that goes on."""
    if note.is_file():
        kept: dict[str, dict[str, float]] = read_json(note)
        return kept
    found = {name: measure(run.model.net, rows) for name, rows in (run.texts.dev | run.texts.test).items()}
    if first():
        atomic_write(note, json.dumps(found))
    return found


def few(rows: Sequence[Tokens]) -> list[Tokens]:
    """Up to four short examples."""
    return sorted(rows, key=len)[: max(4, len(rows) // 4)][-4:]


def check_packing(run: Run, alone: dict[str, float]) -> None:
    """A few examples packed must lose what they lost one by one by the stock net, `alone`. TrainingStopped if not."""
    net = run.model.net
    batch = collated(run, few(run.texts.train), run.plan.batch.layout)
    with torch.no_grad():
        out = net(**{name: value.to(net.device) for name, value in batch.items()}, fused_lm_head=True)
    lost = -float(out.log_probs.double().sum()) / max(1.0, alone["tokens"])
    exact = next(net.parameters()).dtype == torch.float32
    if abs(lost - alone["loss"]) > (1e-4 if exact else 2e-2) * max(1.0, alone["loss"]):
        raise TrainingStopped(
            f"packed and faster, a few examples lose {lost:.5f} nats a token; alone {alone['loss']:.5f}: "
            "something is wrong with this net.\n  Try memory.accelerate: false and batch.layout: padded, and tell us "
            "which model this is"
        )


def _say(run: Run, changes: Sequence[Change], resumed: Path | None) -> None:
    """What will happen, before it does: what was left out, what is learnt of it, what learns, for how long."""
    if not first():
        return
    found = run.texts
    lines = [*found.notes, found.shown] if resumed is None else []
    lines.append(freeze.show(freeze.table(run.model.net, run.model.family)))
    lines += [str(change) for change in changes]
    tokens = sum(len(found.train[index]) for batch in run.batches for index in batch)
    lines.append(f"{run.steps} steps over {tokens:,} tokens, measured every {run.every}")
    if resumed:
        lines.append(f"going on from {resumed.name}")
    print("\n".join(lines), file=sys.stderr)
