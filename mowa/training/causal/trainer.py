"""Set up the stock trainer for a `CausalRecipe` and define its TASK for the training loop (`mowa.training.loop`).

TRL's stock `SFTTrainer` trains. Batches are planned before the first step and packed without padding; a resumed run has
the same ones. `dataset` says which tokens are trained; `mowa.models.causal.accelerate` makes the net faster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mowa.adapters import lora
from mowa.data.chat.encode import TokenizedSample
from mowa.families import is_registered
from mowa.io.atomic import atomic_write, read_json
from mowa.models.causal import accelerate
from mowa.models.causal.document_rope import document_rope
from mowa.training import checkpoints, optimizer, trainer_args
from mowa.training.causal import save, setup, verify
from mowa.training.causal.batches import plan_eval_batches
from mowa.training.causal.dataset import evaluate
from mowa.training.causal.save import Measured
from mowa.training.causal.setup import CausalRun, collate, resolve_learning_rate
from mowa.training.config.causal import CausalRecipe
from mowa.training.distributed.process import is_main_process, is_worker_process
from mowa.training.loop import Session, Task
from mowa.training.monitor import callbacks, progress
from mowa.training.run_dir import RUN_FOLDER
from mowa.types import IGNORE_INDEX, Family


@contextmanager
def session(run: CausalRun, output_dir: Path, resume_from: Path | None) -> Iterator[Session[Measured]]:
    """Evaluate the original checkpoint and set up the net for training; checks that packing does not change the loss.

    Raises:
        TrainingStopped: the loss computed packed and unpacked differs.
    """
    recipe, splits, net = run.recipe, run.splits, run.model.net
    sharded = is_worker_process() and torch.cuda.is_available()  # the whole net may not fit on one GPU
    if torch.cuda.is_available() and not sharded:
        net.to("cuda")
    baseline = {} if sharded else evaluate_baseline(run, output_dir / RUN_FOLDER / "baseline_metrics.json")
    checked = [] if sharded else verify.select_batches(run)
    alone = [verify.evaluate_alone(net, samples) for samples in checked]
    with lora.suppress_peft_warnings():
        trainer, reporter = build_trainer(run, output_dir, resume_from)
    changes = accelerate.accelerate(net, mlp_tiles=recipe.memory.mlp_tiles) if recipe.memory.accelerate else ()
    tokens = sum(len(splits.train[index]) for batch in run.batches for index in batch)
    length = trainer_args.format_length(recipe, run.max_steps, run.eval_steps, f"{tokens:,} tokens")
    shown = (*splits.notes, *run.notes, splits.preview) if resume_from is None else ()

    def measure() -> Measured:
        loss = evaluate_loss(trainer, next(iter(trainer.eval_dataset.values())))["loss"]
        save.verify_best(loss, trainer.state.best_metric, save.loss_tolerance(run))
        return Measured(baseline, loss, next((p.dtype for p in net.parameters() if not p.requires_grad), torch.float32))

    try:
        with document_rope(net):
            for samples, losses in zip(checked, alone, strict=True):
                verify.verify_losses(run, samples, losses)
            yield Session(trainer, reporter, (*shown, *map(str, changes), length), measure)
    finally:
        accelerate.restore(net)


def build_trainer(run: CausalRun, output_dir: Path, resume_from: Path | None) -> tuple[Any, progress.ProgressReporter]:
    """Build TRL's trainer with our batches, optimizer and callbacks."""
    import datasets

    recipe, model, splits = run.recipe, run.model, run.splits
    samples = {"train": splits.train} | splits.dev | splits.test

    def collate_planned(items: list[dict[str, Any]]) -> dict[str, Any]:
        (item,) = items
        chosen = [samples[item["split"]][index] for index in item["indices"]]
        return collate(run, chosen, recipe.batch.packing) | {"batch_index": torch.tensor([item["batch_index"]])}

    def as_dataset(name: str, batches: list[list[int]]) -> Any:
        columns = {"split": [name] * len(batches), "indices": batches, "batch_index": list(range(len(batches)))}
        return datasets.Dataset.from_dict(columns)

    eval_sets = {name: as_dataset(name, _plan_eval_batches(run, part)) for name, part in splits.dev.items()}
    monitor = callbacks.Monitor(recipe.monitors, output_dir, model.net)
    tokens = [sum(len(splits.train[index]) for index in batch) for batch in run.batches]
    reporter = progress.ProgressReporter(0, tokens, unit="tokens")

    def on_batch(loss: float, index: int) -> None:
        names = [splits.train[sample].id for sample in run.batches[index]]
        monitor.on_causal_batch(trainer.state.global_step, loss, names)

    trainer = _trainer_class()(
        recipe,
        model.family,
        on_batch,
        model=model.net,
        args=_arguments(run, output_dir),
        data_collator=collate_planned,
        train_dataset=as_dataset("train", run.batches),
        eval_dataset=eval_sets,
        processing_class=model.tokenizer,
    )
    trainer_args.attach_callbacks(trainer, recipe, monitor, reporter)
    if is_main_process():
        for finding in splits.findings:
            monitor.report(finding)
    return trainer, reporter


def _plan_eval_batches(run: CausalRun, samples: Sequence[TokenizedSample]) -> list[list[int]]:
    batch = run.recipe.batch
    return plan_eval_batches([len(sample) for sample in samples], batch.tokens, batch.packing)


def _trainer_class() -> Any:
    """Return TRL's SFTTrainer with our optimizer, whole checkpoints, and an evaluation that weighs tokens."""
    from trl import SFTTrainer

    class CausalTrainer(optimizer.OptimizerMixin, checkpoints.CompleteCheckpointMixin, SFTTrainer):
        def __init__(
            self, recipe: CausalRecipe, family: Family, on_batch: Callable[[float, int], None], **settings: Any
        ) -> None:
            super().__init__(**settings)
            self.recipe, self.family, self.on_batch = recipe, family, on_batch

        def _send_telemetry(self) -> None:
            """Send nothing; TRL would report the class and machine to the Hub (`tests/laws/test_no_network.py`)."""

        def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
            learning_rate = resolve_learning_rate(self.recipe)
            return optimizer.build_param_groups(net, self.family, self.recipe.optimizer, learning_rate)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            index = int(inputs.pop("batch_index"))
            trained = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if model.training:
                value = loss[0] if return_outputs else loss
                scale = 1.0 if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
                self.on_batch(float(value.detach() * scale / trained.clamp(min=1)), index)
            return loss

        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            if isinstance(dataset, dict):
                metrics: dict[str, float] = {}
                for name, part in dataset.items():
                    metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                return metrics
            started = time.time()
            found = evaluate_loss(self, dataset)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            metrics[f"{metric_key_prefix}_runtime"] = time.time() - started
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return CausalTrainer


def evaluate_loss(trainer: Any, batches: Any) -> dict[str, float]:
    """Return loss (nats per token) and accuracy over all trained tokens of `batches`, on all devices together."""
    net = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    training = net.training
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(batches):
            batch.pop("batch_index")
            inputs = {name: value.to(trainer.args.device) for name, value in batch.items()}
            with trainer.compute_loss_context_manager():
                out = net(**inputs, use_cache=False, fused_lm_head=True)
            parts = [out.log_probs.double().sum(), out.is_top1.double().sum(), out.label_mask.double().sum()]
            sums += trainer.accelerator.gather_for_metrics(torch.stack(parts)[None]).sum(0).cpu()
    net.train(training)
    log_prob, correct, count = sums.tolist()
    return {"loss": -log_prob / max(1.0, count), "accuracy": correct / max(1.0, count)}


def _arguments(run: CausalRun, output_dir: Path) -> Any:
    from trl import SFTConfig

    accelerated = run.recipe.memory.accelerate and is_registered(run.model.family)
    settings = trainer_args.training_arguments(
        run.recipe, output_dir, run.model.net, max_steps=run.max_steps, eval_steps=run.eval_steps
    )
    settings |= {
        "gradient_checkpointing": False,  # `prepare` has turned it on
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{next(iter(run.splits.dev))}_loss",
    }
    config = run.model.net.config.get_text_config()
    if hasattr(config, "output_router_logits") and not (accelerated or hasattr(config, "num_experts")):
        settings["router_aux_loss_coef"] = 0.0  # TRL does not find the number of experts
    return SFTConfig(**settings)


def evaluate_baseline(run: CausalRun, cache_file: Path) -> dict[str, dict[str, float]]:
    """Evaluate the original checkpoint on dev and test, and cache the metrics for a resumed run."""
    if cache_file.is_file():
        cached: dict[str, dict[str, float]] = read_json(cache_file)
        return cached
    splits = run.splits.dev | run.splits.test
    metrics = {name: evaluate(run.model.net, samples) for name, samples in splits.items()}
    if is_main_process():
        atomic_write(cache_file, json.dumps(metrics))
    return metrics


TASK = Task(
    packages=("accelerate", "datasets", "matplotlib", "peft", "trl"),
    extra="text",
    versions=("transformers", "trl", "peft"),
    load=setup.load,
    validate=setup.validate,
    read_data=setup.read_data,
    prepare=setup.prepare,
    saves_frozen=lambda run: run.recipe.method != "lora",
    session=session,
    save=save.save,
    verify=save.verify,
    format_table=save.format_table,
)
