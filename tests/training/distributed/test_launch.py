"""The processes of a run, what becomes of them, and what each strategy is said to need: against torch's own numbers."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HubertConfig, HubertForCTC, Wav2Vec2Config, Wav2Vec2ForCTC

from mowa.errors import MissingDependency, RecipeError
from mowa.training.config import ctc
from mowa.training.distributed import launch, memory, zero_config

DOCS = Path(__file__).parents[2] / "docs" / "across-devices.md"
GB = 10**9
SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "conv_dim": (64,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
LARGE = LAYER | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BILLION = LAYER | {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120}


def a_plan(**turned):
    return ctc.parse({"model": "none", "data": {"train": "none"}} | turned, "test")


def a_net(device="cpu", **config):
    with torch.device(device):
        return Wav2Vec2ForCTC(Wav2Vec2Config(**SMALL | config))


def needs(net, plan, devices=1, precision="float32"):
    found = memory.estimate_memory(net, plan, gpu_bytes=GB, host_bytes=GB, num_devices=devices, precision=precision)
    return found.breakdowns


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """What torchrun is told, instead of starting it."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    seen = []
    environment = {}

    def run(args):
        seen.append(args)
        environment.update(os.environ)

    monkeypatch.setattr("torch.distributed.run.run", run)
    return seen, environment


def test_one_device_needs_no_processes_and_deepspeed_does():
    assert not launch.needs_launcher(a_plan())
    assert not launch.needs_launcher(a_plan(parallel={"strategy": "ddp"}))
    assert launch.needs_launcher(a_plan(parallel={"devices": 2}))
    assert launch.needs_launcher(a_plan(parallel={"nodes": 2}))
    assert launch.needs_launcher(a_plan(parallel={"strategy": "zero3"}))


def test_launch_writes_the_recipe_and_starts_mowa_train_on_it(told, tmp_path):
    plan = a_plan(parallel={"devices": 2})
    launch.launch_workers(plan, tmp_path / "out", threads=6)
    (args,), environment = told
    recipe = tmp_path / "out" / "recipe.yaml"
    assert ctc.read_recipe(recipe) == plan
    assert (args.nproc_per_node, args.nnodes, args.standalone) == ("2", "1:1", True)
    assert args.module
    assert args.training_script == "mowa"
    assert args.training_script_args == ["train", str(recipe), "-o", str(tmp_path / "out"), "--threads", "3"]
    assert environment["OMP_NUM_THREADS"] == "3"
    launch.launch_workers(plan, tmp_path / "out")  # the same again: it goes on
    with pytest.raises(RecipeError, match="another recipe"):
        launch.launch_workers(replace(plan, method="head"), tmp_path / "out")


def test_launching_leaves_the_process_as_it_was(told, tmp_path):
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    launch.run_torchrun(["script.py"], a_plan(parallel={"devices": 2}), tmp_path, threads=1)
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_several_machines_meet_where_the_usual_variables_say(told, tmp_path, monkeypatch):
    plan = a_plan(parallel={"devices": 4, "nodes": 3})
    for name, value in {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="NODE_RANK is not set"):
        launch.run_torchrun(["script.py"], plan, tmp_path, threads=1)
    monkeypatch.setenv("NODE_RANK", "2")
    launch.run_torchrun(["script.py"], plan, tmp_path, threads=1)
    (args,), _ = told
    assert (args.nnodes, args.node_rank, args.master_addr, args.master_port) == ("3", 2, "10.0.0.7", 4321)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("node[07-09,12],gpu1", "node07"),
        ("rack-3-node[2,4]", "rack-3-node2"),
        ("n[1-2].example.org", "n1.example.org"),
    ],
)
def test_under_slurm_the_first_host_is_where_they_meet(told, tmp_path, monkeypatch, names, first):
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": names, "SLURM_NODEID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    launch.run_torchrun(["script.py"], a_plan(parallel={"nodes": 2}), tmp_path, threads=1)
    (args,), _ = told
    assert (args.master_addr, args.node_rank) == (first, 1)
    assert 20_000 <= args.master_port < 40_000


def test_what_is_not_there_is_named_before_anything_starts(told, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"devices is 8.* 2 GPUs"):
        launch.run_torchrun(["script.py"], a_plan(parallel={"devices": 8}), tmp_path, threads=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for turned in ({"parallel": {"strategy": "fsdp"}}, {"optimise": {"precision": "fp16"}}):
        with pytest.raises(RecipeError, match="GPU"):
            launch.run_torchrun(["script.py"], a_plan(**turned), tmp_path, threads=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install deepspeed"):
        launch.run_torchrun(["script.py"], a_plan(parallel={"strategy": "zero2"}), tmp_path, threads=1)
    assert not told[0]


SLEEPER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, ends_with_launcher = Path(sys.argv[1]), len(sys.argv) > 2
if ends_with_launcher:
    from mowa.training import parallel
    parallel.end_with_launcher()
rank = os.environ["RANK"]
ready = folder / f"reader{rank}"
begun = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
reader = subprocess.Popen([sys.executable, "-c", begun])
while not ready.is_file():
    time.sleep(0.05)
(folder / f"pid{rank}.partial").write_text(f"{os.getpid()} {reader.pid}")
(folder / f"pid{rank}.partial").rename(folder / f"pid{rank}")
try:
    time.sleep(600)
except KeyboardInterrupt:
    (folder / f"interrupted{rank}").touch()
    raise
"""
LAUNCHER = """
import sys
from pathlib import Path
from mowa.errors import MowaError
from mowa.training import parallel, tuning
plan = tuning.checked({"model": "none", "data": {"train": "none"}, "parallel": {"devices": 2}}, "test")
try:
    parallel.oversee(sys.argv[2:], plan, Path(sys.argv[1]), threads=1)
except MowaError as wrong:
    sys.exit(f"mowa: {wrong}")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def sleepers(tmp_path):
    """A launcher of two processes that sleep, each with a child of its own: (launcher, pids by rank)."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    started, launchers = [], []

    def start(*more):
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(script), str(tmp_path), *more]
        with (tmp_path / "said").open("w") as said:
            launcher = subprocess.Popen(command, stderr=said)
        launchers.append(launcher)
        notes = [tmp_path / "pid0", tmp_path / "pid1"]
        wait_for(lambda: all(note.is_file() for note in notes) or launcher.poll() is not None)
        assert launcher.poll() is None, (tmp_path / "said").read_text()
        pids = [[int(pid) for pid in note.read_text().split()] for note in notes]
        started.extend(pids[0] + pids[1])
        return launcher, pids

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.wait()
    for pid in filter(alive, started):
        os.kill(pid, signal.SIGKILL)


def wait_for(seen, patience_s=60):
    end = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_process_ends_the_run_with_one_line_and_no_orphans(sleepers, tmp_path):
    for step in (20, 40, 100):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    launcher, pids = sleepers()
    os.kill(pids[1][0], signal.SIGKILL)
    assert launcher.wait(timeout=30) == 1
    assert (tmp_path / "said").read_text().strip().splitlines() == [
        "mowa: process 1 of 2 was ended by SIGKILL (out of memory?), so the others were ended too; "
        f"the same command goes on from checkpoint 100 in {tmp_path}"
    ]
    wait_for(lambda: not any(map(alive, pids[0] + pids[1])), 20)


def test_ctrl_c_reaches_every_process(sleepers, tmp_path):
    launcher, pids = sleepers()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=30) == 130
    assert (tmp_path / "interrupted0").is_file()
    assert (tmp_path / "interrupted1").is_file()
    wait_for(lambda: not any(map(alive, pids[0] + pids[1])), 20)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_a_killed_launcher_takes_its_processes_with_it(sleepers):
    launcher, pids = sleepers("with launcher")
    launcher.kill()
    launcher.wait(timeout=30)
    wait_for(lambda: not alive(pids[0][0]) and not alive(pids[1][0]), 20)


# --- strategies ---------------------------------------------------------------------------------------------------


def test_without_processes_the_trainer_is_told_the_precision_and_nothing_else(told):
    found = launch.distributed_arguments(a_plan(), a_net(), 1, precision="bf16")
    assert found == {"bf16": True, "fp16": False, "use_cpu": not torch.cuda.is_available()}


def test_sharded_weights_refuse_what_they_cannot_do():
    group, layer = a_net(), a_net(**LAYER)
    assert launch.unsupported_reason("zero3", a_plan(optimise={"ema": 0.999}), layer)
    assert launch.unsupported_reason("fsdp", a_plan(optimise={"ema": 0.999}), layer)
    assert not launch.unsupported_reason("zero2", a_plan(optimise={"ema": 0.999}), layer)
    assert "padded" in launch.unsupported_reason("zero3", a_plan(), group)
    assert not launch.unsupported_reason("zero3", a_plan(batch={"layout": "padded"}), group)
    assert not launch.unsupported_reason("zero3", a_plan(), layer)
    with pytest.raises(RecipeError, match="zero3: this net"):
        launch.resolve_strategy(a_plan(parallel={"strategy": "zero3"}), group, 2, precision="float32")


def test_auto_takes_what_fits_and_says_so(capsys, monkeypatch):
    net, plan = a_net(**LAYER), a_plan(parallel={"devices": 2})
    monkeypatch.setenv("RANK", "0")
    choice = launch.resolve_strategy(plan, net, 2, precision="float32")
    assert choice.strategy == "ddp"
    assert "80 % of a device" in choice.reason
    assert choice.reason in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert launch.resolve_strategy(plan, net, 2, precision="float32") == choice
    assert capsys.readouterr().err == ""


def test_deepspeed_is_told_numbers_where_the_trainer_would_look_in_vain():
    plan = a_plan(batch={"accumulate": 3}, optimise={"clip": 0.5})
    block = memory.max_block_parameters(a_net())
    for strategy, stage in (("zero2", 2), ("zero3", 3), ("zero3-offload", 3)):
        config = zero_config.deepspeed_config(strategy, plan, bucket_parameters=block, precision="bf16")
        auto = {key for key, value in config.items() if value == "auto"}
        assert auto == {"train_micro_batch_size_per_gpu", "train_batch_size"}
        assert "auto" not in config["zero_optimization"].values()
        assert config["zero_optimization"]["stage"] == stage
        assert config["zero_optimization"]["reduce_bucket_size"] == block
        assert ("offload_param" in config["zero_optimization"]) == (strategy == "zero3-offload")
        assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (3, 0.5)
        assert "fp16" not in config
        assert config["torch_autocast"]["dtype"] == "bfloat16"
    assert (
        zero_config.deepspeed_config("zero2", plan, bucket_parameters=block, precision="fp16")["fp16"]["loss_scale"]
        == 0
    )  # dynamic


# --- memory -------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_moments_are_what_torch_holds():
    net = a_net()
    net.freeze_feature_encoder()
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-3)
    net(torch.randn(1, 8000)).logits.square().sum().backward()
    optimiser.step()
    moments = sum(v.nbytes for state in optimiser.state.values() for v in state.values() if v.ndim)
    need = needs(net, a_plan())["ddp"]
    there = [p.grad for p in learning if p.grad is not None]
    mute = sum(p.numel() for p in learning if p.grad is None)  # masked_spec_embed, without SpecAugment
    assert need.weights == sum(parameter.nbytes for parameter in net.parameters())
    assert need.gradients == sum(gradient.nbytes for gradient in there) + 4 * mute
    assert need.optimizer_states == moments + 8 * mute


def in_float32(norm, forward, values):
    with torch.autocast("cpu", enabled=False):
        return forward(norm, values.float())


def saved_bytes(net, seconds, autocast):
    """What autograd keeps of a forward pass, each storage once; weights, and their bf16 copies, are not counted.

    Under autocast norms are taken in float32, which is CUDA's rule and not a processor's.
    """
    for module in net.modules() if autocast else ():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            module.forward = partial(in_float32, module, type(module).forward)
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    shapes = {parameter.shape for parameter in net.parameters() if parameter.ndim > 1}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        weight = tensor.dtype == torch.bfloat16 and (tensor.shape in shapes or tensor.mT.shape in shapes)
        if storage.data_ptr() not in own and not weight:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(torch.randn(1, int(seconds * 16_000))).logits.float().log_softmax(-1)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("learns", ["all", "blocks", "top", "head"])
@pytest.mark.parametrize("front", [{}, LAYER], ids=["group", "layer"])
def test_activations_are_what_autograd_keeps(front, learns, autocast):
    net = a_net(**front).train()
    if learns != "all":
        net.freeze_feature_encoder()
    if learns == "top":
        net.requires_grad_(False)
        net.wav2vec2.encoder.layers[-1].requires_grad_(True)
    if learns == "head":
        net.freeze_base_model()
    seconds = 20.0
    kept = saved_bytes(net, seconds, autocast)
    said = memory.saved_activation_bytes(
        net, seconds, precision="bf16" if autocast else "float32", gradient_checkpointing=False
    )
    assert kept == pytest.approx(said, rel=0.1)


NETS = {layers: a_net("meta", **LAYER, num_hidden_layers=layers) for layers in (1, 2, 5)}


@settings(deadline=None, max_examples=60)
@given(
    seconds=st.floats(1, 400),
    more=st.floats(1, 4),
    devices=st.integers(1, 64),
    precision=st.sampled_from(["float32", "bf16", "fp16"]),
    checkpointing=st.booleans(),
)
def test_more_sound_and_more_blocks_need_more_and_more_devices_need_less(
    seconds, more, devices, precision, checkpointing
):
    plan = a_plan(batch={"seconds": seconds}, optimise={"checkpointing": checkpointing})
    larger = a_plan(batch={"seconds": seconds * more}, optimise={"checkpointing": checkpointing})
    here = needs(NETS[2], plan, devices, precision)
    for name, need in needs(NETS[2], larger, devices, precision).items():
        assert need.device_total >= here[name].device_total
    for name, need in needs(NETS[5], plan, devices, precision).items():
        assert (
            need.device_total > here[name].device_total >= needs(NETS[1], plan, devices, precision)[name].device_total
        )
    for name, need in needs(NETS[2], plan, devices + 1, precision).items():
        if name == "ddp":
            assert (need.device_total > here[name].device_total) == (devices == 1)  # its buckets
        else:
            assert need.device_total <= here[name].device_total
            assert need.host <= here[name].host
    if checkpointing:
        whole = needs(NETS[5], a_plan(batch={"seconds": seconds}), devices, precision)
        assert needs(NETS[5], plan, devices, precision)["ddp"].activations < whole["ddp"].activations


def test_the_fastest_that_fits_is_chosen_and_the_others_are_given_a_reason():
    net = a_net("meta", **LARGE)
    plan = a_plan(batch={"seconds": 10.0}, parallel={"devices": 8}, optimise={"checkpointing": True})

    def chosen(gpu, host=10**12):
        return memory.choose_strategy(
            memory.estimate_memory(net, plan, gpu_bytes=gpu * GB, host_bytes=host, num_devices=8)
        )

    order = [chosen(gpu).strategy for gpu in (80, 4, 2, 1)]
    assert order == ["ddp", "zero2", "zero3", "zero3-offload"]
    assert "ddp would need" in chosen(4).reason
    assert "nothing fits" in chosen(0.3).reason
    assert "batch: seconds" in chosen(0.3).reason
    assert "of the host" in chosen(80, host=10**9).reason


@pytest.mark.parametrize(("name", "config"), [("XLSR-53", LARGE), ("1 B", BILLION)])
def test_the_page_shows_what_is_estimated(name, config):
    with torch.device("meta"):
        net = Wav2Vec2ForCTC(Wav2Vec2Config(**config, vocab_size=40))
    net.freeze_feature_encoder()
    plan = a_plan(parallel={"devices": 8})
    known = memory.estimate_memory(net, plan, gpu_bytes=24 * GB, host_bytes=256 * GB, num_devices=8, precision="bf16")
    shown = DOCS.read_text()
    assert memory.format_table(known) in shown
    assert memory.choose_strategy(known).reason in shown


def test_other_families_are_estimated_too():
    with torch.device("meta"):
        net = HubertForCTC(HubertConfig(**SMALL))
    assert needs(net, a_plan())["zero3"].device_total > 0
