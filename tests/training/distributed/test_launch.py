"""Worker processes and how they end, strategies, and memory estimates against the bytes that torch holds."""

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
from mowa.training import run_dir
from mowa.training.config import ctc
from mowa.training.distributed import launch, memory, strategy, zero_config

DOCS = Path(__file__).parents[3] / "docs" / "across-devices.md"
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


def make_recipe(**sections):
    return ctc.parse({"model": "none", "data": {"train": "none"}} | sections, "test")


def make_net(device="cpu", **config):
    with torch.device(device):
        return Wav2Vec2ForCTC(Wav2Vec2Config(**SMALL | config))


def needs(net, recipe, devices=1, precision="float32"):
    found = memory.estimate_memory(net, recipe, gpu_bytes=GB, host_bytes=GB, num_devices=devices, precision=precision)
    return found.breakdowns


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """Record the arguments and environment of torchrun instead of starting it."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    calls = []
    environment = {}

    def run(args):
        calls.append(args)
        environment.update(os.environ)

    monkeypatch.setattr("torch.distributed.run.run", run)
    return calls, environment


def test_which_recipes_need_worker_processes():
    assert not launch.needs_launcher(make_recipe())
    assert not launch.needs_launcher(make_recipe(distributed={"strategy": "ddp"}))
    assert launch.needs_launcher(make_recipe(distributed={"devices": 2}))
    assert launch.needs_launcher(make_recipe(distributed={"nodes": 2}))
    assert launch.needs_launcher(make_recipe(distributed={"strategy": "zero3"}))


def test_launch_writes_the_recipe_and_starts_mowa_train_on_it(torchrun, tmp_path):
    recipe = make_recipe(distributed={"devices": 2})
    launch.launch_workers(recipe, tmp_path / "out", threads=6)
    (args,), environment = torchrun
    file = tmp_path / "out" / "recipe.yaml"
    assert ctc.read_recipe(file) == recipe
    assert (args.nproc_per_node, args.nnodes, args.standalone) == ("2", "1:1", True)
    assert args.module
    assert args.training_script == "mowa"
    assert args.training_script_args == ["train", str(file), "-o", str(tmp_path / "out"), "--threads", "3"]
    assert environment["OMP_NUM_THREADS"] == "3"
    launch.launch_workers(recipe, tmp_path / "out")  # starts again
    run = tmp_path / "out" / "run"
    with run_dir.lock_run_dir(recipe, run):
        (run / "checkpoint-1").mkdir()
        (run / "checkpoint-1" / "complete").touch()
    with pytest.raises(RecipeError, match=r"another recipe \(method\)"):
        launch.launch_workers(replace(recipe, method="head"), tmp_path / "out")


def test_launching_restores_environment_and_signal_handlers(torchrun, tmp_path):
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    launch.run_torchrun(["script.py"], make_recipe(distributed={"devices": 2}), tmp_path, threads=1)
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_several_machines_use_the_usual_variables(torchrun, tmp_path, monkeypatch):
    recipe = make_recipe(distributed={"devices": 4, "nodes": 3})
    for name, value in {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="NODE_RANK is not set"):
        launch.run_torchrun(["script.py"], recipe, tmp_path, threads=1)
    monkeypatch.setenv("NODE_RANK", "2")
    launch.run_torchrun(["script.py"], recipe, tmp_path, threads=1)
    (args,), _ = torchrun
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
def test_slurm_uses_the_first_host(torchrun, tmp_path, monkeypatch, names, first):
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": names, "SLURM_NODEID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    launch.run_torchrun(["script.py"], make_recipe(distributed={"nodes": 2}), tmp_path, threads=1)
    (args,), _ = torchrun
    assert (args.master_addr, args.node_rank) == (first, 1)
    assert 20_000 <= args.master_port < 40_000


def test_missing_hardware_and_packages_are_reported_before_the_start(torchrun, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"devices is 8.* 2 GPUs"):
        launch.run_torchrun(["script.py"], make_recipe(distributed={"devices": 8}), tmp_path, threads=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for sections in ({"distributed": {"strategy": "fsdp"}}, {"optimizer": {"precision": "fp16"}}):
        with pytest.raises(RecipeError, match="GPU"):
            launch.run_torchrun(["script.py"], make_recipe(**sections), tmp_path, threads=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install deepspeed"):
        launch.run_torchrun(["script.py"], make_recipe(distributed={"strategy": "zero2"}), tmp_path, threads=1)
    assert not torchrun[0]


SLEEPER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, exits_with_parent = Path(sys.argv[1]), len(sys.argv) > 2
if exits_with_parent:
    from mowa.training.distributed.process import exit_with_parent
    exit_with_parent()
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
from mowa.training import run_dir
from mowa.training.config import ctc
from mowa.training.distributed import launch
recipe = ctc.parse({"model": "none", "data": {"train": "none"}, "distributed": {"devices": 2}}, "test")
try:
    launch.run_torchrun(sys.argv[2:], recipe, Path(sys.argv[1]), threads=1)
except MowaError as error:
    sys.exit(f"mowa: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def sleepers(tmp_path):
    """Start a launcher of two sleeping processes with a child each: (launcher, pids by rank)."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    started, launchers = [], []

    def start(*more):
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(script), str(tmp_path), *more]
        with (tmp_path / "stderr").open("w") as stderr:
            launcher = subprocess.Popen(command, stderr=stderr)
        launchers.append(launcher)
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        wait_for(lambda: all(file.is_file() for file in files) or launcher.poll() is not None)
        assert launcher.poll() is None, (tmp_path / "stderr").read_text()
        pids = [[int(pid) for pid in file.read_text().split()] for file in files]
        started.extend(pids[0] + pids[1])
        return launcher, pids

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.wait()
    for pid in filter(alive, started):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_process_stops_the_run_with_one_line_and_no_orphans(sleepers, tmp_path):
    for step in (20, 40, 100):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "complete").touch()
    launcher, pids = sleepers()
    os.kill(pids[1][0], signal.SIGKILL)
    assert launcher.wait(timeout=30) == 1
    assert (tmp_path / "stderr").read_text().strip().splitlines() == [
        "mowa: process 1 of 2 was killed by SIGKILL (out of memory?), so the others were stopped; "
        f"the same command resumes from checkpoint 100 in {tmp_path}"
    ]
    wait_for(lambda: not any(map(alive, pids[0] + pids[1])), 20)


def test_ctrl_c_reaches_every_process(sleepers, tmp_path):
    launcher, pids = sleepers()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=30) == 130
    assert (tmp_path / "interrupted0").is_file()
    assert (tmp_path / "interrupted1").is_file()
    wait_for(lambda: not any(map(alive, pids[0] + pids[1])), 20)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl of Linux")
def test_a_killed_launcher_stops_its_processes(sleepers):
    launcher, pids = sleepers("exit with parent")
    launcher.kill()
    launcher.wait(timeout=30)
    wait_for(lambda: not alive(pids[0][0]) and not alive(pids[1][0]), 20)


# --- strategies ---------------------------------------------------------------------------------------------------


def test_without_worker_processes_only_the_precision_is_set(torchrun):
    found = strategy.distributed_arguments(make_recipe(), make_net(), 1, precision="bf16")
    assert found == {"bf16": True, "fp16": False, "use_cpu": not torch.cuda.is_available()}


def test_what_sharded_strategies_do_not_support():
    group, layer = make_net(), make_net(**LAYER)
    assert strategy.unsupported_reason("zero3", make_recipe(optimizer={"ema_decay": 0.999}), layer)
    assert strategy.unsupported_reason("fsdp", make_recipe(optimizer={"ema_decay": 0.999}), layer)
    assert not strategy.unsupported_reason("zero2", make_recipe(optimizer={"ema_decay": 0.999}), layer)
    assert "packing: false" in strategy.unsupported_reason("zero3", make_recipe(), group)
    assert not strategy.unsupported_reason("zero3", make_recipe(batch={"packing": False}), group)
    assert not strategy.unsupported_reason("zero3", make_recipe(), layer)
    with pytest.raises(RecipeError, match="zero3: a group-norm front end"):
        strategy.resolve_strategy(make_recipe(distributed={"strategy": "zero3"}), group, 2, precision="float32")


def test_auto_takes_the_fastest_that_fits_and_prints_it(capsys, monkeypatch):
    net, recipe = make_net(**LAYER), make_recipe(distributed={"devices": 2})
    monkeypatch.setenv("RANK", "0")
    choice = strategy.resolve_strategy(recipe, net, 2, precision="float32")
    assert choice.strategy == "ddp"
    assert "80 % of a device" in choice.reason
    assert choice.reason in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert strategy.resolve_strategy(recipe, net, 2, precision="float32") == choice
    assert capsys.readouterr().err == ""


def test_deepspeed_gets_numbers_that_the_trainer_could_not_find():
    recipe = make_recipe(batch={"gradient_accumulation_steps": 3}, optimizer={"max_grad_norm": 0.5})
    block = memory.max_block_parameters(make_net())
    for name, stage in (("zero2", 2), ("zero3", 3), ("zero3-offload", 3)):
        config = zero_config.deepspeed_config(name, recipe, bucket_parameters=block, precision="bf16")
        auto = {key for key, value in config.items() if value == "auto"}
        assert auto == {"train_micro_batch_size_per_gpu", "train_batch_size"}
        assert "auto" not in config["zero_optimization"].values()
        assert config["zero_optimization"]["stage"] == stage
        assert config["zero_optimization"]["reduce_bucket_size"] == block
        assert ("offload_param" in config["zero_optimization"]) == (name == "zero3-offload")
        assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (3, 0.5)
        assert "fp16" not in config
        assert config["torch_autocast"]["dtype"] == "bfloat16"
    config = zero_config.deepspeed_config("zero2", recipe, bucket_parameters=block, precision="fp16")
    assert config["fp16"]["loss_scale"] == 0  # dynamic


# --- memory -------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_moments_equal_those_of_torch():
    net = make_net()
    net.freeze_feature_encoder()
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    net(torch.randn(1, 8000)).logits.square().sum().backward()
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    need = needs(net, make_recipe())["ddp"]
    gradients = [p.grad for p in trainable if p.grad is not None]
    unused = sum(p.numel() for p in trainable if p.grad is None)  # masked_spec_embed, without SpecAugment
    assert need.weights == sum(parameter.nbytes for parameter in net.parameters())
    assert need.gradients == sum(gradient.nbytes for gradient in gradients) + 4 * unused
    assert need.optimizer_states == moments + 8 * unused


def in_float32(norm, forward, values):
    with torch.autocast("cpu", enabled=False):
        return forward(norm, values.float())


def saved_bytes(net, seconds, autocast):
    """Count the bytes that autograd saves in a forward pass, without weights and their bf16 copies.

    Under autocast norms run in float32, as on CUDA and unlike on CPUs.
    """
    for module in net.modules() if autocast else ():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            module.forward = partial(in_float32, module, type(module).forward)
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    shapes = {parameter.shape for parameter in net.parameters() if parameter.ndim > 1}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_weight = tensor.dtype == torch.bfloat16 and (tensor.shape in shapes or tensor.mT.shape in shapes)
        if storage.data_ptr() not in weights and not is_weight:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(torch.randn(1, int(seconds * 16_000))).logits.float().log_softmax(-1)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("trained", ["all", "blocks", "top", "head"])
@pytest.mark.parametrize("front", [{}, LAYER], ids=["group", "layer"])
def test_activations_equal_those_of_autograd(front, trained, autocast):
    net = make_net(**front).train()
    if trained != "all":
        net.freeze_feature_encoder()
    if trained == "top":
        net.requires_grad_(False)
        net.wav2vec2.encoder.layers[-1].requires_grad_(True)
    if trained == "head":
        net.freeze_base_model()
    seconds = 20.0
    saved = saved_bytes(net, seconds, autocast)
    estimated = memory.saved_activation_bytes(
        net, seconds, precision="bf16" if autocast else "float32", gradient_checkpointing=False
    )
    assert saved == pytest.approx(estimated, rel=0.1)


NETS = {layers: make_net("meta", **LAYER, num_hidden_layers=layers) for layers in (1, 2, 5)}


@settings(deadline=None, max_examples=60)
@given(
    seconds=st.floats(1, 400),
    more=st.floats(1, 4),
    devices=st.integers(1, 64),
    precision=st.sampled_from(["float32", "bf16", "fp16"]),
    checkpointing=st.booleans(),
)
def test_estimates_grow_with_audio_and_blocks_and_shrink_with_devices(seconds, more, devices, precision, checkpointing):
    recipe = make_recipe(batch={"seconds": seconds}, optimizer={"gradient_checkpointing": checkpointing})
    larger = make_recipe(batch={"seconds": seconds * more}, optimizer={"gradient_checkpointing": checkpointing})
    base = needs(NETS[2], recipe, devices, precision)
    for name, need in needs(NETS[2], larger, devices, precision).items():
        assert need.device_total >= base[name].device_total
    for name, need in needs(NETS[5], recipe, devices, precision).items():
        assert (
            need.device_total > base[name].device_total >= needs(NETS[1], recipe, devices, precision)[name].device_total
        )
    for name, need in needs(NETS[2], recipe, devices + 1, precision).items():
        if name == "ddp":
            assert (need.device_total > base[name].device_total) == (devices == 1)  # DDP buckets
        else:
            assert need.device_total <= base[name].device_total
            assert need.host <= base[name].host
    if checkpointing:
        whole = needs(NETS[5], make_recipe(batch={"seconds": seconds}), devices, precision)
        assert needs(NETS[5], recipe, devices, precision)["ddp"].activations < whole["ddp"].activations


def test_the_fastest_that_fits_is_chosen_with_reasons_against_the_others():
    net = make_net("meta", **LARGE)
    recipe = make_recipe(
        batch={"seconds": 10.0}, distributed={"devices": 8}, optimizer={"gradient_checkpointing": True}
    )

    def chosen(gpu, host=10**12):
        return memory.choose_strategy(
            memory.estimate_memory(net, recipe, gpu_bytes=gpu * GB, host_bytes=host, num_devices=8)
        )

    order = [chosen(gpu).strategy for gpu in (80, 4, 2, 1)]
    assert order == ["ddp", "zero2", "zero3", "zero3-offload"]
    assert "ddp would need" in chosen(4).reason
    assert "nothing fits" in chosen(0.3).reason
    assert "batch: seconds" in chosen(0.3).reason
    assert "of the host" in chosen(80, host=10**9).reason


@pytest.mark.parametrize(("name", "config"), [("XLSR-53", LARGE), ("1 B", BILLION)])
def test_the_docs_show_the_estimate(name, config):
    with torch.device("meta"):
        net = Wav2Vec2ForCTC(Wav2Vec2Config(**config, vocab_size=40))
    net.freeze_feature_encoder()
    recipe = make_recipe(distributed={"devices": 8})
    estimate = memory.estimate_memory(
        net, recipe, gpu_bytes=24 * GB, host_bytes=256 * GB, num_devices=8, precision="bf16"
    )
    page = DOCS.read_text()
    assert memory.format_table(estimate) in page
    assert memory.choose_strategy(estimate).reason in page


def test_other_families_are_estimated():
    with torch.device("meta"):
        net = HubertForCTC(HubertConfig(**SMALL))
    assert needs(net, make_recipe())["zero3"].device_total > 0
