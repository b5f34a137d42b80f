"""Fine-tuning, end to end on tiny nets: what comes of it loads anywhere, and a killed run ends as an unbroken one."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, pipeline

from mowa import loading
from mowa.data.manifests import examples as sources
from mowa.errors import RecipeError
from mowa.models.ctc_encoder import packing
from mowa.quantization import quantize
from mowa.training.config import ctc, schema
from mowa.training.ctc import batches as packs
from mowa.training.ctc import module as pupil
from mowa.training.ctc import setup, trainer
from tests.checkpoints import clip, corpus, tiny

SHORT = {
    "optimise": {"steps": 6, "learning_rate": 1e-3, "precision": "float32"},
    "batch": {"seconds": 4.0},
    "evaluate": {"every": 3},
    "data": {"measured": 6},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), conv_dim=(8,) * 7, intermediate_size=32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), 24)


def recipe(base, manifest, **settings):
    tree = schema.apply_overrides({"model": str(base), "data": {"train": [manifest], "dev": [manifest]}}, {})
    for group, knobs in SHORT.items():
        for name, value in knobs.items():
            tree = schema.apply_overrides(tree, {f"{group}.{name}": value})
    return ctc.parse(schema.apply_overrides(tree, settings), "test")


def run(plan, out):
    model = loading.load(plan.model, require_head=plan.vocabulary != "new")
    return trainer.train_ctc(plan, model, out, threads=1)


@pytest.mark.parametrize("what", ["head", "top-1", "encoder", "all"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_only_what_should_learn_moves_and_the_result_is_a_stock_checkpoint(base, manifest, tmp_path, what, layout):
    out = run(recipe(base, manifest, **{"train": what, "batch.layout": layout}), tmp_path / "out")
    before, after = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (base, out))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name].to(value.dtype))}
    expected = {
        "head": lambda name: name.startswith("lm_head"),
        "top-1": lambda name: name.startswith(("lm_head", "wav2vec2.encoder.layers.1", "wav2vec2.encoder.layer_norm")),
        "encoder": lambda name: "feature_extractor" not in name,
        "all": lambda name: True,
    }[what]
    assert moved
    assert all(map(expected, moved))
    assert {"lm_head.weight"} <= moved
    assert isinstance(pipeline("automatic-speech-recognition", model=str(out))(clip(0, 16_000))["text"], str)
    report = json.loads((out / "report.json").read_text())
    assert report["results"]["dev"]["recordings"] == 6
    assert report["learning"] == sum(
        value.numel() for name, value in after.items() if expected(name) or what == "all"
    ) or what in ("encoder", "all")  # weight norm is two tensors of one weight
    assert (out / "curve.png").stat().st_size > 1000


def test_a_new_vocabulary_is_made_of_the_texts(base, manifest, tmp_path):
    out = run(recipe(base, manifest, vocabulary="new", train="head"), tmp_path / "out")
    vocabulary = json.loads((out / "vocab.json").read_text())
    letters = {letter for line in Path(manifest).read_text().splitlines() for letter in json.loads(line)["text"]}
    assert set(vocabulary) - {"<pad>", "<s>", "</s>", "<unk>", "|"} == letters - {" "}
    assert len(loading.load(str(out)).vocabulary) == len(vocabulary)


@pytest.mark.parametrize("what", ["lora", "adapters"])
def test_an_adapter_is_small_and_fits_its_base(base, manifest, tmp_path, what):
    from mowa.adapters import checkpoint

    out = run(recipe(base, manifest, train=what), tmp_path / "out")
    assert not (out / "model.safetensors").exists()
    adapted = checkpoint.load_adapter(loading.load(str(base)), out)
    values = torch.from_numpy(clip(0, 16_000))[None]
    with torch.no_grad():
        assert not torch.allclose(adapted.net(values).logits, loading.load(str(base)).net(values).logits)


RESUMED = {"optimise.ema": 0.9, "batch.accumulate": 2, "train": "all", "masks.features": 0.1}


def test_a_killed_run_ends_in_the_same_bits(base, manifest, tmp_path):
    """kill -9 after the first checkpoint, whatever the run is doing then; dropout, masks and EMA are on. Every run is a
    process of its own: what others before it made of this one may change how products are summed."""
    file, whole, out = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "broken"
    schema.write_yaml(recipe(base, manifest, **RESUMED, **{"optimise.steps": 9}), file)
    command = [sys.executable, "-m", "mowa", "train", str(file), "--threads", "1", "-o", str(whole)]
    subprocess.run(command, check=True, capture_output=True)
    command[-1] = str(out)
    broken = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while broken.poll() is None and not list((out / "run").glob("checkpoint-*/whole")):
        time.sleep(0.02)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert not (out / "model.safetensors").exists()
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not list((out / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_run_killed_five_times_ends_in_the_same_bits(base, manifest, tmp_path):
    """kill -9 at five moments drawn by chance: while it steps, measures or writes a checkpoint."""
    plan = recipe(base, manifest, **RESUMED, **{"optimise.steps": 40, "evaluate.every": 2})
    whole = run(plan, tmp_path / "whole")
    file, out = tmp_path / "recipe.yaml", tmp_path / "broken"
    schema.write_yaml(plan, file)
    command = [sys.executable, "-m", "mowa", "train", str(file), "-o", str(out), "--threads", "1"]

    def reached():
        return max((int(mark.parent.name.partition("-")[2]) for mark in out.glob("run/*/whole")), default=0)

    chance, died = np.random.default_rng(), []
    for _ in range(5):
        goal = reached() + int(chance.integers(2, 7))
        broken = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while broken.poll() is None and reached() < goal:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
        broken.send_signal(signal.SIGKILL)
        broken.wait()
        died.append(reached())
    assert not (out / "model.safetensors").exists(), died
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), died


def test_another_recipe_in_the_same_folder_is_refused(base, manifest, tmp_path):
    run(recipe(base, manifest), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run(recipe(base, manifest), tmp_path / "out")  # finished before: nothing is done
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="another recipe \\(train\\)"):
        run(recipe(base, manifest, train="head"), tmp_path / "out")


def test_a_shrunk_net_learns_nothing(base, manifest, tmp_path):
    small = quantize(loading.load(str(base)), "int8-weight")
    with pytest.raises(RecipeError, match="is in int8-weight, in which nothing is learnt: name the checkpoint that it"):
        trainer.train_ctc(recipe(base, manifest), small, tmp_path / "out")


def test_accumulated_batches_weigh_every_letter_alike(base, manifest, tmp_path):
    """One step of plain SGD-like size: two batches accumulated move the weights as the two in one loop would."""
    plan = recipe(
        base, manifest, **{"batch.accumulate": 2, "optimise.steps": 1, "evaluate.every": 1, "masks.time": 0.0}
    )
    plan = dataclasses.replace(plan, augment=ctc.NO_AUGMENT)
    model = loading.load(plan.model)
    for module in model.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.net.config.attention_dropout = model.net.config.layerdrop = 0.0
    for layer in model.net.wav2vec2.encoder.layers:
        layer.attention.dropout = 0.0
    seen = []
    loss = pupil.build_compute_loss(model.vocabulary.blank, None)
    made = setup.prepare(plan, model, tmp_path / "out")
    batches = packs.BatchDataset(
        made.batches,
        packs.BatchOptions(
            made.model.vocabulary, model.preprocessing, packing.frame_geometry(model.net.config), 32, "packed"
        ),
    )
    taught = pupil.CTCModule(model.net, packing="packed", use_attention_mask=False)
    items = [batches[0], batches[1]]
    letters = sum(int((item["labels"] != -100).sum()) for item in items)
    with packing.packed_attention(model.net):
        for item in items:
            labels = item.pop("labels")
            part = loss(taught(**item), labels, letters)
            part.backward()
            seen.append(float(part.detach()))
    expected = sum(float(p.grad.square().sum()) for p in model.net.parameters() if p.grad is not None) ** 0.5
    again = loading.load(plan.model)
    for module in again.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    again.net.config.layerdrop = 0.0
    for layer in again.net.wav2vec2.encoder.layers:
        layer.attention.dropout = 0.0
    out = trainer.train_ctc(plan, again, tmp_path / "out", threads=1)
    (row,) = [row for line in (out / "history.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert row["loss"] == pytest.approx(sum(seen), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(expected, rel=1e-3)


def test_packed_batches_hold_what_was_planned(base, manifest):
    model = loading.load(str(base))
    examples = [dataclasses.replace(example, text="ab a") for example in sources.read_examples(manifest)]
    batches = packs.plan_batches(
        [(examples, 0.0)], max_seconds=4.0, packing="packed", epochs=2, num_batches=0, multiple_of=2, seed=1
    )
    assert len(batches) % 2 == 0
    ids = [example.id for batch in batches for example in batch]
    assert all(ids.count(example.id) >= 2 for example in examples)
    assert all(sum(e.duration_s for e in batch) <= 4.0 or len(batch) == 1 for batch in batches)
    how = packs.BatchOptions(
        model.vocabulary,
        model.preprocessing,
        packing.frame_geometry(model.net.config),
        32,
        "packed",
        augment=ctc.DEFAULT_AUGMENT,
        spec_augment=ctc.SpecAugmentConfig(mask_feature_prob=0.2),
        seed=3,
    )
    data = packs.BatchDataset(batches, how)
    item, again = data[1], data[1]
    assert all(torch.equal(value, again[name]) for name, value in item.items())
    counts = [how.frames.num_frames(n) for n in item["lengths"].tolist()]
    assert item["hidden"].shape == (sum(counts),)
    assert item["silenced"].shape == (len(counts), 32)
    assert item["input_values"].shape[0] == 1
    assert np.isfinite(item["input_values"].numpy()).all()
