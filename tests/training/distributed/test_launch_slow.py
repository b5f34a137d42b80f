"""Two gloo processes train like one under every strategy; and a run resumes after one of them dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Wav2Vec2ForCTC

pytestmark = pytest.mark.slow

STEPS = 20
# A random net of two blocks and the stock Trainer with two learning rates; of mowa only `training.distributed`.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.trainer_utils import get_last_checkpoint
from mowa.training.checkpoints import MarkCompleteCallback
from mowa.training.config import ctc
from mowa.training.distributed import strategy

out, sections, die_at = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
STEPS = 20
recipe = ctc.parse({"model": "none", "data": {"train": "none"}} | sections, "test")
config = Wav2Vec2Config(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, conv_dim=(32,) * 7,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=12, feat_extract_norm="layer",
    do_stable_layer_norm=True, conv_bias=True, hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
    feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False,
)
torch.manual_seed(0)
net = Wav2Vec2ForCTC(config)
net.freeze_feature_encoder()
net.wav2vec2.masked_spec_embed.requires_grad_(False)
if recipe.optimizer.gradient_checkpointing:
    getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)({"use_reentrant": False})


def drop_frozen(module, state, prefix, _):
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def ignore_missing_frozen(module, keys):
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
        self.register_state_dict_post_hook(drop_frozen)
        self.register_load_state_dict_post_hook(ignore_missing_frozen)

    def forward(self, input_values, index):
        return {"logits": self.net(input_values).logits.float(), "index": index}


class Recordings(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * STEPS

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        length, tokens = 8_000 + 400 * (index % 7), 4 + index % 3
        return {
            "input_values": torch.randn(1, length, generator=random),
            "index": torch.tensor([index]),
            "labels": torch.randint(1, 12, (1, tokens), generator=random),
        }


def loss(outputs, labels, num_items_in_batch=None):
    frames = outputs["logits"].log_softmax(-1).transpose(0, 1)
    counts, lengths = torch.tensor([frames.shape[0]]), torch.tensor([labels.shape[1]])
    losses = nn.functional.ctc_loss(frames, labels, counts, lengths, reduction="none")
    return losses.sum() / (labels.shape[1] if num_items_in_batch is None else num_items_in_batch)


class OwnOptimizer(Trainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            head = [p for name, p in named if "lm_head" in name]
            body = [p for name, p in named if "lm_head" not in name]
            self.optimizer = torch.optim.AdamW(
                [{"params": head, "lr": 2e-3, "weight_decay": 0.0}, {"params": body, "lr": 5e-4, "weight_decay": 0.01}]
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: min(1.0, (step + 1) / 5))
        return self.lr_scheduler


class RecordRates(TrainerCallback):
    rates = []

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        if state.global_step == die_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)


settings = {
    "output_dir": str(out / "run"), "max_steps": STEPS, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": recipe.batch.gradient_accumulation_steps, "train_sampling_strategy": "sequential",
    "max_grad_norm": recipe.optimizer.max_grad_norm, "logging_steps": 1, "save_steps": 5,
    "remove_unused_columns": False, "label_names": ["labels"], "disable_tqdm": True, "report_to": "none",
    "dataloader_num_workers": 1,
}
settings |= strategy.distributed_arguments(
    recipe, net, recipe.distributed.devices, precision=recipe.optimizer.precision
)
(out / "run").mkdir(parents=True, exist_ok=True)
trainer = OwnOptimizer(
    model=Module(), args=TrainingArguments(**settings), train_dataset=Recordings(),
    data_collator=lambda items: items[0], compute_loss_func=loss, callbacks=[RecordRates(), MarkCompleteCallback()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out / "run")))
state = strategy.gather_state_dict(trainer)
assert (state is None) == (os.environ.get("RANK", "0") != "0")
if state is not None:
    curve = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (out / "result.json").write_text(json.dumps({
        "curve": curve, "rates": RecordRates.rates, "world": trainer.args.world_size,
        "kind": str(trainer.accelerator.distributed_type), "norms": [
            row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
    }))
    save_file({name.removeprefix("net."): value for name, value in state.items()}, out / "model.safetensors",
              metadata={"format": "pt"})
    config.architectures = ["Wav2Vec2ForCTC"]
    config.save_pretrained(out)
"""
LAUNCHER = """
import json, sys
from pathlib import Path
from mowa.errors import MowaError
from mowa.training.config import ctc
from mowa.training.distributed import launch
recipe = ctc.parse({"model": "none", "data": {"train": "none"}} | json.loads(sys.argv[3]), "test")
try:
    launch.run_torchrun(sys.argv[1:], recipe, Path(sys.argv[2]), threads=1)
except MowaError as error:
    sys.exit(f"mowa: {error}")
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Run the script once per set of arguments: train("zero3") → (folder, result)."""
    script = tmp_path_factory.mktemp("script") / "train.py"
    script.write_text(SCRIPT)
    finished = {}

    def run(strategy, folder=None, die_at=0, **optimizer):
        key = (strategy, folder, die_at, *sorted(optimizer.items()))
        if key not in finished:
            finished[key] = start(strategy, folder or tmp_path_factory.mktemp(strategy), die_at, optimizer)
        return finished[key]

    def start(strategy, out, die_at, optimizer):
        optimizer = {"precision": "float32"} | optimizer
        single = {"batch": {"gradient_accumulation_steps": 2}, "optimizer": optimizer}
        sharded = {"distributed": {"devices": 2, "strategy": strategy}, "optimizer": optimizer}
        words = [str(script), str(out), json.dumps(single if strategy == "single" else sharded), str(die_at)]
        command = [sys.executable, *words] if strategy == "single" else [sys.executable, "-c", LAUNCHER, *words]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=550)
        if die_at:
            return out, done
        assert done.returncode == 0, done.stdout + done.stderr
        return out, json.loads((out / "result.json").read_text())

    return run


KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "zero3-checkpointing": "DEEPSPEED"}


@pytest.mark.parametrize("strategy", KINDS)
def test_two_processes_train_like_one(train, strategy):
    """Losses, gradient norms and learning rates over twenty steps of two batches, on one process or on two."""
    name, _, checkpointing = strategy.partition("-")
    _, single = train("single")
    _, sharded = train(name, gradient_checkpointing=True) if checkpointing else train(name)
    assert (sharded["world"], KINDS[strategy] in sharded["kind"]) == (2, True)
    assert len(single["curve"]) == STEPS
    assert single["curve"][-1] < 0.8 * single["curve"][0]
    assert sharded["curve"] == pytest.approx(single["curve"], rel=1e-3)
    assert sharded["norms"] == pytest.approx(single["norms"], rel=1e-2)
    assert sharded["rates"] == single["rates"]
    assert single["rates"][-1] == [2e-3, 5e-4]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_bf16_trains_like_float32(train, strategy):
    _, exact = train("single")
    folder, half = train(strategy, precision="bf16")
    assert half["curve"] == pytest.approx(exact["curve"], rel=3e-2)
    assert half["curve"] != pytest.approx(exact["curve"], rel=1e-6)
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_gathered_weights_load_in_transformers(train, strategy):
    """Every weight is complete, and the logits are close to those of the single process."""
    nets = []
    for name in ("single", strategy):
        net, info = Wav2Vec2ForCTC.from_pretrained(train(name)[0], output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        nets.append(net.eval())
    values = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        single, sharded = (net(values).logits for net in nets)
    assert (single - sharded).abs().max() < 1e-2 * single.abs().max()


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_killed_process_stops_the_run_and_the_same_command_resumes(train, tmp_path, strategy):
    _, killed = train(strategy, folder=tmp_path, die_at=12)
    assert killed.returncode == 1
    last = killed.stderr.strip().splitlines()[-1]
    assert last.startswith(f"mowa: process 1 of 2 was killed by {signal.SIGKILL.name}")
    assert last.endswith(f"the same command resumes from checkpoint 10 in {tmp_path}")
    assert not (tmp_path / "result.json").exists()
    assert not children(tmp_path)
    _, resumed = train(strategy, folder=tmp_path)
    uninterrupted_folder, uninterrupted = train(strategy)
    assert resumed["curve"] == uninterrupted["curve"]
    assert resumed["rates"] == uninterrupted["rates"][10:]
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, uninterrupted_folder))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def children(folder):
    """Return the processes whose command line contains the folder."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in line.read_text():
                found.append(line.parent.name)
        except OSError:
            continue
    return [pid for pid in found if int(pid) != os.getpid()]
