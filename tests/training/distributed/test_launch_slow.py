"""Two gloo processes learn what one does, whichever way the weights are shared out; and what is left when one dies."""

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
# A random net of two blocks, the stock Trainer, two rates and a schedule of our own; nothing of mowa but `parallel`.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.trainer_utils import get_last_checkpoint
from mowa.training import parallel, tuning

out, turned, die_at = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
STEPS = 20
plan = tuning.checked({"model": "none", "data": {"train": "none"}} | turned, "test")
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
if plan.optimise.checkpointing:
    getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)({"use_reentrant": False})


def without_frozen(pupil, state, prefix, _):
    for name, parameter in pupil.named_parameters():
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def frozen_may_lack(pupil, keys):
    frozen = {name for name, parameter in pupil.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


class Pupil(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
        self.register_state_dict_post_hook(without_frozen)
        self.register_load_state_dict_post_hook(frozen_may_lack)

    def forward(self, input_values, index):
        return {"logits": self.net(input_values).logits.float(), "index": index}


class Sounds(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * STEPS

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        length, letters = 8_000 + 400 * (index % 7), 4 + index % 3
        return {
            "input_values": torch.randn(1, length, generator=random),
            "index": torch.tensor([index]),
            "labels": torch.randint(1, 12, (1, letters), generator=random),
        }


def loss(outputs, labels, num_items_in_batch=None):
    frames = outputs["logits"].log_softmax(-1).transpose(0, 1)
    counts, letters = torch.tensor([frames.shape[0]]), torch.tensor([labels.shape[1]])
    each = nn.functional.ctc_loss(frames, labels, counts, letters, reduction="none")
    return each.sum() / (labels.shape[1] if num_items_in_batch is None else num_items_in_batch)


class Tuned(Trainer):
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


class Watch(TrainerCallback):
    rates = []

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        if state.global_step == die_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)


settings = {
    "output_dir": str(out / "run"), "max_steps": STEPS, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": plan.batch.accumulate, "train_sampling_strategy": "sequential",
    "max_grad_norm": plan.optimise.clip, "logging_steps": 1, "save_steps": 5, "save_total_limit": 2,
    "remove_unused_columns": False, "label_names": ["labels"], "disable_tqdm": True, "report_to": "none",
    "dataloader_num_workers": 1,
}
settings |= parallel.arguments(plan, net, plan.parallel.devices, precision=plan.optimise.precision)
(out / "run").mkdir(parents=True, exist_ok=True)
trainer = Tuned(
    model=Pupil(), args=TrainingArguments(**settings), train_dataset=Sounds(), data_collator=lambda items: items[0],
    compute_loss_func=loss, callbacks=[Watch()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out / "run")))
state = parallel.consolidated(trainer)
assert (state is None) == (os.environ.get("RANK", "0") != "0")
if state is not None:
    curve = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (out / "told.json").write_text(json.dumps({
        "curve": curve, "rates": Watch.rates, "world": trainer.args.world_size,
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
from mowa.training import parallel, tuning
plan = tuning.checked({"model": "none", "data": {"train": "none"}} | json.loads(sys.argv[3]), "test")
try:
    parallel.oversee(sys.argv[1:], plan, Path(sys.argv[2]), threads=1)
except MowaError as wrong:
    sys.exit(f"mowa: {wrong}")
"""


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Runs of the script, each once: learn("zero3") → (folder, what it told)."""
    script = tmp_path_factory.mktemp("script") / "learn.py"
    script.write_text(SCRIPT)
    finished = {}

    def run(strategy, folder=None, die_at=0, **optimise):
        key = (strategy, folder, die_at, *sorted(optimise.items()))
        if key not in finished:
            finished[key] = start(strategy, folder or tmp_path_factory.mktemp(strategy), die_at, optimise)
        return finished[key]

    def start(strategy, out, die_at, optimise):
        optimise = {"precision": "float32"} | optimise
        alone = {"batch": {"accumulate": 2}, "optimise": optimise}
        shared = {"parallel": {"devices": 2, "strategy": strategy}, "optimise": optimise}
        words = [str(script), str(out), json.dumps(alone if strategy == "alone" else shared), str(die_at)]
        command = [sys.executable, *words] if strategy == "alone" else [sys.executable, "-c", LAUNCHER, *words]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=550)
        if die_at:
            return out, done
        assert done.returncode == 0, done.stdout + done.stderr
        return out, json.loads((out / "told.json").read_text())

    return run


KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "zero3-checkpointing": "DEEPSPEED"}


@pytest.mark.parametrize("strategy", KINDS)
def test_two_processes_learn_what_one_does(learn, strategy):
    """Loss, gradient norm and every group's rate, over twenty steps: two batches a step, on one process or on two."""
    name, _, checkpointing = strategy.partition("-")
    _, alone = learn("alone")
    _, shared = learn(name, checkpointing=True) if checkpointing else learn(name)
    assert (shared["world"], KINDS[strategy] in shared["kind"]) == (2, True)
    assert len(alone["curve"]) == STEPS
    assert alone["curve"][-1] < 0.8 * alone["curve"][0]
    assert shared["curve"] == pytest.approx(alone["curve"], rel=1e-3)
    assert shared["norms"] == pytest.approx(alone["norms"], rel=1e-2)
    assert shared["rates"] == alone["rates"]
    assert alone["rates"][-1] == [2e-3, 5e-4]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_bf16_learns_what_float32_does(learn, strategy):
    _, exact = learn("alone")
    folder, rough = learn(strategy, precision="bf16")
    assert rough["curve"] == pytest.approx(exact["curve"], rel=3e-2)
    assert rough["curve"] != pytest.approx(exact["curve"], rel=1e-6)
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_the_consolidated_weights_load_in_plain_transformers(learn, strategy):
    """Every weight is there, whole, and hears what the single process's net hears."""
    nets = []
    for name in ("alone", strategy):
        net, told = Wav2Vec2ForCTC.from_pretrained(learn(name)[0], output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        nets.append(net.eval())
    sound = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        alone, shared = (net(sound).logits for net in nets)
    assert (alone - shared).abs().max() < 1e-2 * alone.abs().max()


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(learn, tmp_path, strategy):
    _, died = learn(strategy, folder=tmp_path, die_at=12)
    assert died.returncode == 1
    last = died.stderr.strip().splitlines()[-1]
    assert last.startswith(f"mowa: process 1 of 2 was ended by {signal.SIGKILL.name}")
    assert last.endswith(f"the same command goes on from checkpoint 10 in {tmp_path}")
    assert not (tmp_path / "told.json").exists()
    assert not children(tmp_path)
    _, resumed = learn(strategy, folder=tmp_path)
    _, unbroken = learn(strategy)
    assert resumed["curve"] == pytest.approx(unbroken["curve"], rel=1e-4)
    assert resumed["rates"] == unbroken["rates"][10:]


def children(folder):
    """Processes whose command line names the folder."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in line.read_text():
                found.append(line.parent.name)
        except OSError:
            continue
    return [pid for pid in found if int(pid) != os.getpid()]
