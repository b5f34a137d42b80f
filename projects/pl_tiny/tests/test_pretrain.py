"""A training run of a few steps, end to end: it resumes with the same numbers and writes a stock checkpoint."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, pipeline

import mowa
from mowa.errors import DataError, MissingDependency, RecipeError
from mowa.models.ctc_encoder.chunk_mask import TrainedChunking, get_trained_chunking
from mowa.models.ctc_encoder.fast_training import ChannelsLastGELU, channels_last_front_end
from mowa.types import Example
from projects.pl_tiny import batches, pretrain
from projects.pl_tiny.batches import Clip
from projects.pl_tiny.recipe import Augment, Dev, Optimise, Recipe, Source, Stage, Streaming, read
from tests.checkpoints import clip, corpus

NET = {
    "conv_dim": [8] * 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "conv_bias": True,
    "do_stable_layer_norm": True, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    manifest = corpus(tmp_path_factory.mktemp("corpus"), 24)
    how = Optimise(steps=6, batch_s=3.0, shortest_first=2, warmup_steps=1, bf16=False, evaluate_every=3, seed=5)
    stage = Stage("letters", (Source(manifest),), (Dev("dev", manifest),), augment=Augment(0, 4), optimise=how)
    return Recipe("test", (stage,), net=NET)


def altered(recipe, **how):
    (stage,) = recipe.stages
    return dataclasses.replace(
        recipe, stages=(dataclasses.replace(stage, optimise=dataclasses.replace(stage.optimise, **how)),)
    )


def test_run_resumes_and_loads_anywhere(recipe, tmp_path):
    whole = pretrain.train(recipe, tmp_path / "whole", threads=1)
    # The same run, broken off after step 3: the later checkpoint and the result never came to be.
    shutil.copytree(tmp_path / "whole" / "stages", tmp_path / "broken" / "stages")
    stage = tmp_path / "broken" / "stages" / "0-letters"
    shutil.rmtree(stage / "checkpoints" / "checkpoint-6")
    (stage / "weights.safetensors").unlink()
    broken = pretrain.train(recipe, tmp_path / "broken", threads=1)
    ours, theirs = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (whole, broken))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)
    with pytest.raises(RecipeError, match="another recipe"):
        pretrain.train(altered(recipe, learning_rate=1.0), tmp_path / "broken", threads=1)
    assert (whole / "curve.png").stat().st_size > 1000
    steps = [json.loads(line)["step"] for line in (whole / "history.jsonl").read_text().splitlines()]
    assert {3, 6} <= set(steps)
    assert isinstance(pipeline("automatic-speech-recognition", model=str(whole))(clip(0, 16_000))["text"], str)


def test_missing_packages_are_named_before_the_night(recipe, tmp_path, monkeypatch):
    parts = pretrain.machine.optional_package_versions() | {"matplotlib": None}
    monkeypatch.setattr(pretrain.machine, "optional_package_versions", lambda: parts)
    with pytest.raises(MissingDependency, match="matplotlib"):
        pretrain.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_is_exact_and_within_budget():
    rng = np.random.default_rng(0)
    clips = [Clip(Example(str(i), "", "", float(rng.uniform(0.5, 9)))) for i in range(500)]
    sources = [(clips, 1.0)]
    plan = batches.plan(sources, count=200, budget_s=20, shortest_first=5, seed=1)
    assert plan == batches.plan(sources, count=200, budget_s=20, shortest_first=5, seed=1)
    assert len(plan) == 200
    assert all(len(group) * max(clip.duration_s for clip in group) <= 20 for group in plan)
    assert max(clip.duration_s for group in plan[:5] for clip in group) < np.median([clip.duration_s for clip in clips])
    in_one_epoch = len(list(batches.fill(sorted(clips, key=lambda clip: clip.duration_s), 20)))
    epoch = batches.plan(sources, count=in_one_epoch, budget_s=20, shortest_first=0, seed=1)
    assert {clip.example.id for group in epoch for clip in group} == {clip.example.id for clip in clips}


def test_sources_have_their_shares_of_the_seconds():
    short = [Clip(Example(f"s{i}", "", "", 1.0)) for i in range(30)]
    long = [Clip(Example(f"l{i}", "", "", 5.0), letters=False, ear=True) for i in range(700)]
    plan = batches.plan([(short, 0.25), (long, 0.75)], count=400, budget_s=20, shortest_first=0, seed=1)
    seconds = {ear: sum(c.duration_s for group in plan for c in group if c.ear is ear) for ear in (True, False)}
    assert seconds[False] / sum(seconds.values()) == pytest.approx(0.25, abs=0.02)
    heard = [clip.example.id for group in plan for clip in group]
    assert {clip.example.id for clip in short} <= set(heard)


def test_channel_last_is_the_same_function(recipe):
    net = AutoModelForCTC.from_config(
        pretrain._config(dataclasses.replace(recipe, alphabet="abc"), pretrain.build_vocabulary("abc"))
    )
    values = torch.from_numpy(np.stack([clip(0, 5000), clip(1, 5000)]))
    labels = torch.tensor([[5, 6], [7, 5]])

    def step():
        net.zero_grad()
        torch.manual_seed(0)
        loss = net.eval()(values, labels=labels).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    plain = step()
    with channels_last_front_end(net) as swapped:
        assert swapped == 7
        fast = step()
    assert not any(isinstance(module, ChannelsLastGELU) for module in net.modules())
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)


def test_rates_freeze_and_are_checked(recipe):
    net = AutoModelForCTC.from_config(pretrain._config(recipe, pretrain.build_vocabulary(recipe.alphabet)))
    lesson = pretrain.Lesson(net, pretrain.Weights())
    rates = {"wav2vec2.encoder": 0.0, "wav2vec2.encoder.layers.0.attention": 0.5, "lm_head": 2.0}
    optimiser = pretrain._optimiser(lesson, Optimise(learning_rate=1e-3, rates=rates))
    moving = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    named = {name: moving.get(id(p)) for name, p in net.named_parameters()}
    assert named["lm_head.weight"] == 2e-3
    assert named["wav2vec2.encoder.layer_norm.weight"] is None
    assert named["wav2vec2.encoder.layers.0.attention.q_proj.weight"] == 5e-4
    assert named["wav2vec2.feature_projection.projection.weight"] == 1e-3
    with pytest.raises(RecipeError, match="wav2vec3"):
        pretrain._optimiser(lesson, Optimise(rates={"wav2vec3": 1.0}))


def test_average_is_the_mean_of_the_last_checkpoints(recipe, tmp_path):
    out = pretrain.train(altered(recipe, average=2), tmp_path, threads=1)
    states = [pretrain.load_file(f) for f in sorted(out.glob("stages/*/checkpoints/*/model.safetensors"))]
    mean = pretrain.load_file(out / "stages" / "0-letters" / "weights.safetensors")
    for name, value in mean.items():
        torch.testing.assert_close(value, (states[0][f"net.{name}"] + states[1][f"net.{name}"]) / 2)


def test_keep_goes_back_below_the_head_and_blank_moves_its_bias(recipe, tmp_path):
    def trained(name, blank=0.0, **how):
        out = pretrain.train(dataclasses.replace(altered(recipe, **how), blank=blank), tmp_path / name, threads=1)
        state = AutoModelForCTC.from_pretrained(out).state_dict()
        return {name: value.float() for name, value in state.items()}

    end, start, between = trained("end"), trained("start", keep=0.0), trained("between", -1.5, keep=0.25)
    moved = 0
    for name in (name for name in end if name.startswith("wav2vec2.")):
        torch.testing.assert_close(between[name], start[name].lerp(end[name], 0.25), rtol=2e-3, atol=1e-4)
        moved += not torch.equal(start[name], end[name])
    assert moved > 5
    torch.testing.assert_close(between["lm_head.weight"], end["lm_head.weight"])
    change = between["lm_head.bias"] - end["lm_head.bias"]
    torch.testing.assert_close(change, torch.tensor([-1.5] + [0.0] * (len(change) - 1)), atol=1e-3, rtol=0)


def test_little_disk_is_told_before_the_first_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"checkpoints need .* MB of disk, 0 MB are free"):
        pretrain.train(recipe, tmp_path / "out")


def test_windows_are_full_and_the_same_every_time(recipe):
    source = recipe.stages[0].sources[0].manifest
    clips = [Clip(example, letters=False, ear=True) for example in pretrain.synth.read_manifest(Path(source))]
    how = {"batch_s": 4.0, "window_s": 1.5, "rough": Augment(0, 2), "seed": 3}
    one, other = (batches.Windows([(clips, 1.0)], 5, pretrain.Preprocessing(), **how) for _ in range(2))
    assert len(one) == 5
    for index in (4, 0):
        batch = one[index]
        assert batch["input_values"].shape == (2, 24_000)
        assert batch["attention_mask"].all()
        assert batch["ear"].all()
        assert (batch["labels"] == -100).all()
        torch.testing.assert_close(batch["input_values"], other[index]["input_values"])
    assert not torch.equal(one[0]["input_values"], one[1]["input_values"])
    torch.testing.assert_close(one[1]["input_values"].std(1), torch.ones(2), atol=1e-3, rtol=0)


def test_clips_without_letters_have_no_labels(recipe):
    example = next(pretrain.synth.read_manifest(Path(recipe.stages[0].sources[0].manifest)))
    group = [[Clip(example), Clip(example, letters=False, ear=True)]]
    batch = batches.Batches(group, pretrain.build_vocabulary(recipe.alphabet), pretrain.Preprocessing())[0]
    assert batch["ear"].tolist() == [False, True]
    assert (batch["labels"][1] == -100).all()
    assert (batch["labels"][0] >= 0).any()
    assert batch["input_values"].shape[1] % 8_000 == 0


def live(recipe, **how):
    (stage,) = recipe.stages
    heard = Streaming((0.1, 0.2, math.inf), **how)
    dev = (*stage.dev, Dev("live", stage.dev[0].manifest, 3, 0.1, 0.04))
    return dataclasses.replace(recipe, stages=(dataclasses.replace(stage, streaming=heard, dev=dev),))


def test_hearing_in_chunks_is_trained_and_stands_in_the_config(recipe, tmp_path):
    out = pretrain.train(live(recipe, left_s=1.0, ahead_s=(0.0, 0.04)), tmp_path / "out", threads=1)
    net = AutoModelForCTC.from_pretrained(out)
    assert get_trained_chunking(net.config) == TrainedChunking((5, 10), 50, (0, 2))
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert any("eval_live_cer" in row for row in rows)
    assert read(out / "recipe.yaml").stages[0].streaming == Streaming((0.1, 0.2, math.inf), 1.0, (0.0, 0.04))
    stream = mowa.stream(str(out))
    assert isinstance(stream.feed(clip(0, 16_000)), list)


def test_every_batch_has_a_chunk_of_its_own_and_is_normalised_as_live(recipe):
    clips = [Clip(example) for example in pretrain.synth.read_manifest(Path(recipe.stages[0].sources[0].manifest))][:2]
    words, sound = pretrain.build_vocabulary(recipe.alphabet), pretrain.Preprocessing()
    made = batches.Batches([clips] * 40, words, sound, chunks=(5, 10, 0), ahead=(0, 2), seed=3)
    again = batches.Batches([clips] * 40, words, sound, chunks=(5, 10, 0), ahead=(0, 2), seed=3)
    drawn = [(int(made[i]["chunk"]), int(made[i]["ahead"])) for i in range(40)]
    assert {chunk for chunk, _ in drawn} == {0, 5, 10}
    assert {ahead for _, ahead in drawn} == {0, 2}
    assert drawn == [(int(again[i]["chunk"]), int(again[i]["ahead"])) for i in range(40)]
    whole, live = (next(i for i, (chunk, _) in enumerate(drawn) if bool(chunk) is one) for one in (False, True))
    assert abs(float(made[whole]["input_values"][0][: int(made[whole]["attention_mask"][0].sum())].mean())) < 1e-4
    assert not torch.equal(made[whole]["input_values"], made[live]["input_values"])


def test_chunks_that_cannot_be_trained_are_refused_before_the_first_step(recipe, tmp_path):
    group = dataclasses.replace(live(recipe), net=NET | {"feat_extract_norm": "group", "do_stable_layer_norm": False})
    with pytest.raises(RecipeError, match="cannot hear in chunks: its front end normalises"):
        pretrain.train(group, tmp_path / "a")
    (stage,) = live(recipe).stages
    silent = dataclasses.replace(recipe, stages=(dataclasses.replace(stage, letters=0.0),))
    with pytest.raises(RecipeError, match="streaming is learnt with letters"):
        pretrain.train(silent, tmp_path / "b")
