"""The training loop, for speech and text: a failed attempt blocks nothing, and what was saved is read back."""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import Trainer

import mowa
from mowa import hardware, loading
from mowa.adapters import checkpoint
from mowa.errors import DataError, MissingDependency, RecipeError, TrainingStopped
from mowa.io.hashing import sha256_file
from mowa.io.manifest import find_manifest
from mowa.models.diff import ModelDiff
from mowa.training import checkpoints, loop, resources, run_dir
from mowa.training.causal import save as causal_save
from mowa.training.config import dispatch, schema
from mowa.training.ctc import save as ctc_save
from tests.checkpoints import clip, corpus, tiny
from tests.training.causal import chats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    tiny(folder / "speech", conv_dim=(8,) * 7, intermediate_size=32)
    corpus(folder / "corpus", 8)
    chats.recipe(folder)
    (folder / "empty.jsonl").write_text("")
    return folder


def make_recipe(folder, task, **overrides):
    if task == "causal":
        tree = chats.recipe(folder, optimizer__max_steps=2, evaluation__eval_steps=1)
    else:
        manifest = next((folder / "corpus").glob("*.jsonl"))
        tree = {
            "model": str(folder / "speech"),
            "data": {"train": str(manifest), "dev": str(manifest), "max_eval_samples": 4},
            "batch": {"seconds": 4.0},
            "optimizer": {"max_steps": 2, "precision": "float32"},
            "evaluation": {"eval_steps": 1},
        }
    return dispatch.parse(schema.apply_overrides(tree, overrides), "test")


def train(recipe, out):
    return dispatch.train(recipe, out, threads=1)


def break_data(folder, monkeypatch):
    return {"data.train": str(folder / "empty.jsonl")}, DataError


def break_recipe(folder, monkeypatch):
    return {"method": "top-9"}, RecipeError


def break_packages(folder, monkeypatch):
    installed = hardware.optional_package_versions() | {"accelerate": None}
    monkeypatch.setattr(hardware, "optional_package_versions", lambda: installed)
    return {}, MissingDependency


def fill_disk(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    return {}, DataError


def fill_disk_while_saving(folder, monkeypatch):
    """The first checkpoint fails in the midst: the weights are there, the optimizer is not."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    return {}, OSError


def use_all_memory(folder, monkeypatch):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1000)
    return {}, RecipeError


FAILURES = [break_data, break_recipe, break_packages, fill_disk, fill_disk_while_saving, use_all_memory]


@pytest.mark.parametrize("task", ["ctc", "causal"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_attempt_does_not_block_a_corrected_recipe(folder, tmp_path, monkeypatch, task, failure):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        overrides, error = failure(folder, patch)
        with pytest.raises(error):
            train(make_recipe(folder, task, **overrides), out)
    if failure is not fill_disk_while_saving:
        assert not out.exists()
    corrected = make_recipe(folder, task, **{"optimizer.learning_rate": 1e-4})
    with run_dir.lock_run_dir(corrected, out / "run"):  # nothing is trained here: that takes seconds
        assert sorted(path.name for path in (out / "run").iterdir()) == ["format", "lock", "recipe.yaml"]
        assert schema.read_yaml(out / "run" / "recipe.yaml")["optimizer"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("task", ["ctc", "causal"])
def test_after_a_failure_while_saving_another_recipe_trains_in_the_folder(folder, tmp_path, monkeypatch, task):
    with monkeypatch.context() as patch:
        fill_disk_while_saving(folder, patch)
        with pytest.raises(OSError, match="No space left"):
            train(make_recipe(folder, task), tmp_path / "out")
    assert list((tmp_path / "out" / "run").glob("checkpoint-*"))
    corrected = make_recipe(folder, task, **{"optimizer.learning_rate": 1e-4})
    out = train(corrected, tmp_path / "out")
    assert json.loads((out / "report.json").read_text())["global_step"] == 2
    assert not list((out / "run").glob("checkpoint-*"))
    assert not (out / ".partial").exists()
    with pytest.raises(RecipeError, match="another recipe"):
        train(make_recipe(folder, task), out)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_finished_run_has_a_manifest_and_opens_by_its_folder(folder, tmp_path, method, capsys):
    recipe = make_recipe(folder, "ctc", method=method)
    out = train(recipe, tmp_path / "out")
    assert "Writing model shards" not in capsys.readouterr().err  # a progress bar of transformers
    found = find_manifest(out)
    assert (found.artifact, found.task, found.family) == ("run" if method == "full" else "adapter", "ctc", "wav2vec2")
    assert found.origin["name"] == str(folder / "speech")
    found.verify_files()
    run = found.sections["run"]
    assert (run["method"], run["model"], run["global_step"]) == (method, recipe.model, 2)
    assert run["recipe"] == {"file": "recipe.yaml", "sha256": sha256_file(out / "recipe.yaml")}
    assert (out / run["report"]).is_file()
    options = {"sampling_rate": 16_000, "vad_threshold": 0.0}
    by_path, loaded = (mowa.transcribe(clip(0, 16_000), model, **options) for model in (out, mowa.load(out)))
    assert by_path.text == loaded.text


HOLD_LOCK = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
input()"""


def test_two_processes_do_not_train_in_one_folder(folder, tmp_path):
    recipe, command = make_recipe(folder, "ctc"), [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with (
            pytest.raises(RecipeError, match="another process is training in"),
            run_dir.lock_run_dir(recipe, tmp_path),
        ):
            pass
        other.communicate(b"\n")
    with run_dir.lock_run_dir(recipe, tmp_path):
        pass


# --- read back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_speech_model_that_is_saved_wrong_is_not_reported(folder, tmp_path, monkeypatch, method):
    """The files lose a weight on the way: the run stops with the numbers, and resumes to a good end."""
    recipe, out = make_recipe(folder, "ctc", method=method), tmp_path / "out"
    load_again = ctc_save.load_again

    def damaged(run, folder):
        model = load_again(run, folder)
        with torch.no_grad():
            model.net.lm_head.bias[1] += 0.1
        return model

    with monkeypatch.context() as patch:
        patch.setattr(ctc_save, "load_again", damaged)
        with pytest.raises(
            TrainingStopped, match=r"differs by .* nats, .*limit: at most 0.001 nats.*\n  The checkpoint in run/"
        ):
            train(recipe, out)
    assert run_dir.find_last_checkpoint(out / "run").name == "checkpoint-2"
    assert not (out / "report.json").exists()
    report = json.loads((train(recipe, out) / "report.json").read_text())
    assert report["saved_model_difference"]["max_log_prob"] < 1e-5
    assert report["saved_model_difference"]["clips"] == 4


def diff(max_abs_diff, *, agreement, num_frames=99):
    return ModelDiff(max_abs_diff, 0.0, 0.0, 0.0, 0.0, agreement, num_frames)


def test_a_comparison_of_no_frames_does_not_count():
    with pytest.raises(TrainingStopped):
        ctc_save.verify_emissions(diff(0.0, agreement=1.0, num_frames=0), 1e-3)


def test_half_precision_is_compared_by_its_top_tokens():
    ctc_save.verify_emissions(diff(0.5, agreement=0.95), None)
    with pytest.raises(TrainingStopped, match="limit: at least 90% of frames"):
        ctc_save.verify_emissions(diff(0.5, agreement=0.85), None)


def test_a_language_model_that_is_saved_wrong_is_not_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(causal_save, "evaluate", lambda net, samples: {"loss": 9.0, "accuracy": 0.0, "tokens": 1})
    with pytest.raises(TrainingStopped, match=r"its loss is 9\.0000 nats per token; before saving it was"):
        train(make_recipe(folder, "causal"), tmp_path / "out")
    assert run_dir.find_last_checkpoint(tmp_path / "out" / "run").name == "checkpoint-2"


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_an_adapter_over_a_new_vocabulary_is_read_back(folder, tmp_path, method):
    recipe = make_recipe(folder, "ctc", method=method, vocabulary="new")
    out = dispatch.train(recipe, tmp_path / "out", threads=1)
    assert len(checkpoint.read_adapter(out).vocabulary) > 5


# --- resources --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ctc", "causal"])
def prepared(request, folder, tmp_path):
    recipe = make_recipe(folder, request.param, method="full", **{"optimizer.max_steps": 9})
    task = dispatch.load_task(recipe.task)
    return task, loop.prepare(task, recipe, loading.load(recipe.model), tmp_path)


def test_the_size_of_checkpoints_is_that_of_the_files(prepared, tmp_path, monkeypatch):
    task, run = prepared
    sizes = []
    finish = loop.finalize_run

    def measure(recipe, model, trainer, output_dir, report, **options):
        sizes.extend(
            sum(file.stat().st_size for file in path.glob("*") if file.suffix in (".safetensors", ".pt"))
            for path in run_dir.list_checkpoints(output_dir / "run")
        )
        finish(recipe, model, trainer, output_dir, report, **options)

    monkeypatch.setattr(loop, "finalize_run", measure)
    out = loop.train(task, run.recipe, loading.load(run.recipe.model), tmp_path / "out", threads=1)
    (weights,) = (path.stat().st_size for path in out.glob("*.safetensors"))
    expected = resources.checkpoint_bytes(run, saves_frozen=task.saves_frozen(run))
    assert 3 * max(sizes) + weights == pytest.approx(expected, rel=0.4)  # headers are large beside a tiny net


def test_memory_is_refused_only_where_it_clearly_does_not_suffice(prepared, tmp_path, monkeypatch):
    task, run = prepared

    def line(available):
        monkeypatch.setattr(hardware, "available_memory_bytes", lambda: available)
        return resources.check_resources(run, tmp_path, saves_frozen=task.saves_frozen(run))

    words = line(10**12)
    assert "of 1000.0 GB" in words
    need = float(words.split("about ")[1].split()[0]) * 1e6
    assert "may not suffice" in line(int(need / 1.2))
    with pytest.raises(RecipeError, match=r"does not fit: it needs about .* MB of .*\n  Reduce batch: (tokens|sec)"):
        line(int(need / 2))


def test_disk_space_of_a_resumed_run_counts_as_free(tmp_path, monkeypatch):
    (tmp_path / "old").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9000, 500))
    resources.check_disk(1400, tmp_path)
    resources.check_disk(400, tmp_path / "new" / "out")
    with pytest.raises(DataError, match="checkpoints need 0 MB of disk, 0 MB are free"):
        resources.check_disk(1600, tmp_path)


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path):
    mark = checkpoints.MarkCompleteCallback()

    @dataclasses.dataclass
    class State:
        global_step: int
        best_model_checkpoint: str
        is_world_process_zero: bool = True

    class Arguments:
        output_dir = str(tmp_path)

    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark.on_save(Arguments, State(step, str(tmp_path / f"checkpoint-{best}")), None)
        kept = {path.name for path in run_dir.list_checkpoints(tmp_path)}
        assert {f"checkpoint-{step}", f"checkpoint-{best}"} <= kept
        assert len(kept) == min(2, step)
