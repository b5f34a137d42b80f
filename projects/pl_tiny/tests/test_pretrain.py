"""Short training runs end to end: they resume with the same numbers and write checkpoints that transformers loads."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, pipeline

import mowa
from mowa.data.manifests.examples import read_examples
from mowa.errors import DataError, MissingDependency, RecipeError
from mowa.models.ctc_encoder.chunk_mask import TrainedChunking, get_trained_chunking
from mowa.models.ctc_encoder.fast_training import ChannelsLastGELU, channels_last_front_end
from mowa.training import checkpoints, run_dir
from mowa.types import Example
from projects.pl_tiny import batches, pretrain
from projects.pl_tiny.batches import BatchDataset, Clip, WindowDataset, plan_batches
from projects.pl_tiny.feature_distillation import FeatureDistillationModule, LossWeights
from projects.pl_tiny.recipe import (
    AugmentSchedule,
    DevSet,
    OptimizerConfig,
    Source,
    Stage,
    StagedRecipe,
    StreamingConfig,
    read_recipe,
)
from projects.pl_tiny.text import POLISH_ALPHABET
from tests.checkpoints import clip, corpus

NET = {
    "conv_dim": [8] * 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "conv_bias": True,
    "do_stable_layer_norm": True, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    manifest = corpus(tmp_path_factory.mktemp("corpus"), 24)
    how = OptimizerConfig(max_steps=6, batch_s=3.0, shortest_first=2, warmup_steps=1, bf16=False, eval_steps=3, seed=5)
    stage = Stage(
        "letters", (Source(manifest),), (DevSet("dev", manifest),), augment=AugmentSchedule(0, 4), optimizer=how
    )
    return StagedRecipe("test", "pl", POLISH_ALPHABET, (stage,), model_config=NET)


@pytest.fixture
def examples(recipe):
    return list(read_examples(recipe.stages[0].sources[0].manifest))


def with_optimizer(recipe, **changes):
    (stage,) = recipe.stages
    optimizer = dataclasses.replace(stage.optimizer, **changes)
    return dataclasses.replace(recipe, stages=(dataclasses.replace(stage, optimizer=optimizer),))


def test_run_resumes_and_loads_anywhere(recipe, tmp_path, monkeypatch):
    whole = pretrain.train(recipe, tmp_path / "whole", threads=1)
    marked = checkpoints.MarkCompleteCallback.on_save

    def interrupt(self, args, state, control, **more):
        marked(self, args, state, control, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.MarkCompleteCallback, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(recipe, tmp_path / "broken", threads=1)
    stage = tmp_path / "broken" / "stages" / "0-letters"
    assert [path.name for path in run_dir.list_checkpoints(stage)] == ["checkpoint-3"]
    broken = pretrain.train(recipe, tmp_path / "broken", threads=1)
    assert not list(stage.glob("checkpoint-*"))
    ours, theirs = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (whole, broken))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)
    with pytest.raises(RecipeError, match="another recipe"):
        pretrain.train(with_optimizer(recipe, learning_rate=1.0), tmp_path / "broken", threads=1)
    assert (whole / "curve.png").stat().st_size > 1000
    steps = [json.loads(line)["step"] for line in (whole / "history.jsonl").read_text().splitlines()]
    assert {3, 6} <= set(steps)
    assert isinstance(pipeline("automatic-speech-recognition", model=str(whole))(clip(0, 16_000))["text"], str)


def test_missing_packages_are_reported_before_training(recipe, tmp_path, monkeypatch):
    parts = pretrain.hardware.optional_package_versions() | {"matplotlib": None}
    monkeypatch.setattr(pretrain.hardware, "optional_package_versions", lambda: parts)
    with pytest.raises(MissingDependency, match="matplotlib"):
        pretrain.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_is_exact_and_within_budget():
    rng = np.random.default_rng(0)
    clips = [Clip(Example(str(i), "", "", float(rng.uniform(0.5, 9)))) for i in range(500)]
    sources = [(clips, 1.0)]
    plan = plan_batches(sources, count=200, budget_s=20, shortest_first=5, seed=1)
    assert plan == plan_batches(sources, count=200, budget_s=20, shortest_first=5, seed=1)
    assert len(plan) == 200
    assert all(len(group) * max(clip.duration_s for clip in group) <= 20 for group in plan)
    assert max(clip.duration_s for group in plan[:5] for clip in group) < np.median([clip.duration_s for clip in clips])
    in_one_epoch = len(list(batches.group_by_padded_duration(sorted(clips, key=lambda clip: clip.duration_s), 20)))
    epoch = plan_batches(sources, count=in_one_epoch, budget_s=20, shortest_first=0, seed=1)
    assert {clip.example.id for group in epoch for clip in group} == {clip.example.id for clip in clips}


def test_sources_get_their_shares_of_the_seconds():
    short = [Clip(Example(f"s{i}", "", "", 1.0)) for i in range(30)]
    long = [Clip(Example(f"l{i}", "", "", 5.0), ctc=False, features=True) for i in range(700)]
    plan = plan_batches([(short, 0.25), (long, 0.75)], count=400, budget_s=20, shortest_first=0, seed=1)
    clips = [clip for group in plan for clip in group]
    seconds = {kind: sum(clip.duration_s for clip in clips if clip.features is kind) for kind in (True, False)}
    assert seconds[False] / sum(seconds.values()) == pytest.approx(0.25, abs=0.02)
    assert {clip.example.id for clip in short} <= {clip.example.id for clip in clips}


def test_channels_last_front_end_computes_the_same(recipe):
    net = AutoModelForCTC.from_config(
        pretrain.build_config(dataclasses.replace(recipe, alphabet="abc"), pretrain.build_vocabulary("abc"))
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
    with channels_last_front_end(net) as count:
        assert count == 7
        fast = step()
    assert not any(isinstance(module, ChannelsLastGELU) for module in net.modules())
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)


def test_lr_multipliers_freeze_and_are_checked(recipe):
    net = AutoModelForCTC.from_config(pretrain.build_config(recipe, pretrain.build_vocabulary(recipe.alphabet)))
    module = FeatureDistillationModule(net, LossWeights())
    multipliers = {"wav2vec2.encoder": 0.0, "wav2vec2.encoder.layers.0.attention": 0.5, "lm_head": 2.0}
    optimizer = pretrain.build_optimizer(module, OptimizerConfig(learning_rate=1e-3, lr_multipliers=multipliers))
    lr_by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    lr = {name: lr_by_id.get(id(p)) for name, p in net.named_parameters()}
    assert lr["lm_head.weight"] == 2e-3
    assert lr["wav2vec2.encoder.layer_norm.weight"] is None
    assert lr["wav2vec2.encoder.layers.0.attention.q_proj.weight"] == 5e-4
    assert lr["wav2vec2.feature_projection.projection.weight"] == 1e-3
    with pytest.raises(RecipeError, match="wav2vec3"):
        pretrain.build_optimizer(module, OptimizerConfig(lr_multipliers={"wav2vec3": 1.0}))


def test_averaged_checkpoints_are_the_mean_of_the_last(recipe, tmp_path, monkeypatch):
    states, average = [], pretrain.average_checkpoints

    def record(net, folders):
        states.extend(pretrain.load_file(folder / "model.safetensors") for folder in folders)
        average(net, folders)

    monkeypatch.setattr(pretrain, "average_checkpoints", record)
    out = pretrain.train(with_optimizer(recipe, average_checkpoints=2), tmp_path, threads=1)
    mean = pretrain.load_file(out / "stages" / "0-letters" / "weights.safetensors")
    for name, value in mean.items():
        torch.testing.assert_close(value, (states[0][f"net.{name}"] + states[1][f"net.{name}"]) / 2)


def test_weight_interpolation_below_the_head_and_blank_bias(recipe, tmp_path):
    def trained(name, blank_bias=0.0, **changes):
        changed = dataclasses.replace(with_optimizer(recipe, **changes), blank_bias=blank_bias)
        out = pretrain.train(changed, tmp_path / name, threads=1)
        state = AutoModelForCTC.from_pretrained(out).state_dict()
        return {name: value.float() for name, value in state.items()}

    end, start = trained("end"), trained("start", weight_interpolation=0.0)
    between = trained("between", -1.5, weight_interpolation=0.25)
    moved = 0
    for name in (name for name in end if name.startswith("wav2vec2.")):
        torch.testing.assert_close(between[name], start[name].lerp(end[name], 0.25), rtol=2e-3, atol=1e-4)
        moved += not torch.equal(start[name], end[name])
    assert moved > 5
    torch.testing.assert_close(between["lm_head.weight"], end["lm_head.weight"])
    change = between["lm_head.bias"] - end["lm_head.bias"]
    torch.testing.assert_close(change, torch.tensor([-1.5] + [0.0] * (len(change) - 1)), atol=1e-3, rtol=0)


def test_a_full_disk_is_reported_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"checkpoints need .* MB of disk, 0 MB are free"):
        pretrain.train(recipe, tmp_path / "out")


def test_windows_are_unpadded_and_reproducible(examples):
    clips = [Clip(example, ctc=False, features=True) for example in examples]
    how = {"batch_s": 4.0, "window_s": 1.5, "schedule": AugmentSchedule(0, 2), "seed": 3}
    one, other = (WindowDataset([(clips, 1.0)], 5, pretrain.Preprocessing(), **how) for _ in range(2))
    assert len(one) == 5
    for index in (4, 0):
        batch = one[index]
        assert batch["input_values"].shape == (2, 24_000)
        assert batch["attention_mask"].all()
        assert batch["use_features"].all()
        assert (batch["labels"] == -100).all()
        torch.testing.assert_close(batch["input_values"], other[index]["input_values"])
    assert not torch.equal(one[0]["input_values"], one[1]["input_values"])
    torch.testing.assert_close(one[1]["input_values"].std(1), torch.ones(2), atol=1e-3, rtol=0)


def test_clips_without_ctc_have_no_labels(recipe, examples):
    group = [[Clip(examples[0]), Clip(examples[0], ctc=False, features=True)]]
    batch = BatchDataset(group, pretrain.build_vocabulary(recipe.alphabet), pretrain.Preprocessing())[0]
    assert batch["use_features"].tolist() == [False, True]
    assert (batch["labels"][1] == -100).all()
    assert (batch["labels"][0] >= 0).any()
    assert batch["input_values"].shape[1] % 8_000 == 0


def with_streaming(recipe, **changes):
    (stage,) = recipe.stages
    streaming = StreamingConfig((0.1, 0.2, math.inf), **changes)
    dev = (*stage.dev, DevSet("live", stage.dev[0].manifest, 3, 0.1, 0.04))
    return dataclasses.replace(recipe, stages=(dataclasses.replace(stage, streaming=streaming, dev=dev),))


def test_training_in_chunks_is_recorded_in_the_config(recipe, tmp_path):
    recipe = with_streaming(recipe, left_context_s=1.0, lookahead_s=(0.0, 0.04))
    out = pretrain.train(recipe, tmp_path / "out", threads=1)
    net = AutoModelForCTC.from_pretrained(out)
    assert get_trained_chunking(net.config) == TrainedChunking((5, 10), 50, (0, 2))
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert any("eval_live_cer" in row for row in rows)
    assert read_recipe(out / "recipe.yaml") == recipe
    stream = mowa.stream(str(out))
    assert isinstance(stream.feed(clip(0, 16_000)), list)


def test_each_batch_draws_a_chunk_and_is_normalized_as_a_stream(recipe, examples):
    clips = [Clip(example) for example in examples][:2]
    vocabulary, preprocessing = pretrain.build_vocabulary(recipe.alphabet), pretrain.Preprocessing()
    how = {"chunk_frames": (5, 10, 0), "lookahead_frames": (0, 2), "seed": 3}
    one, again = (BatchDataset([clips] * 40, vocabulary, preprocessing, **how) for _ in range(2))
    drawn = [(int(one[i]["chunk_frames"]), int(one[i]["lookahead_frames"])) for i in range(40)]
    assert {chunk for chunk, _ in drawn} == {0, 5, 10}
    assert {lookahead for _, lookahead in drawn} == {0, 2}
    assert drawn == [(int(again[i]["chunk_frames"]), int(again[i]["lookahead_frames"])) for i in range(40)]
    offline, live = (next(i for i, (chunk, _) in enumerate(drawn) if bool(chunk) is kind) for kind in (False, True))
    length = int(one[offline]["attention_mask"][0].sum())
    assert abs(float(one[offline]["input_values"][0][:length].mean())) < 1e-4
    assert not torch.equal(one[offline]["input_values"], one[live]["input_values"])


def test_unsupported_streaming_is_refused_before_training(recipe, tmp_path):
    config = NET | {"feat_extract_norm": "group", "do_stable_layer_norm": False}
    group_norm = dataclasses.replace(with_streaming(recipe), model_config=config)
    with pytest.raises(RecipeError, match="cannot be trained in chunks: its front end normali"):
        pretrain.train(group_norm, tmp_path / "a")
    (stage,) = with_streaming(recipe).stages
    without_ctc = dataclasses.replace(recipe, stages=(dataclasses.replace(stage, ctc_weight=0.0),))
    with pytest.raises(RecipeError, match="streaming needs the CTC loss"):
        pretrain.train(without_ctc, tmp_path / "b")


def test_an_optional_source_may_be_missing(recipe, tmp_path, capsys):
    (stage,) = recipe.stages
    absent = Source(str(tmp_path / "absent.jsonl"), share=3.0, optional=True)
    data = pretrain._load_stage_data(dataclasses.replace(stage, sources=(*stage.sources, absent)))
    assert [share for _, share in data.sources] == [1.0]
    assert "absent.jsonl not found; this optional source is skipped" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        pretrain._load_stage_data(dataclasses.replace(stage, sources=(dataclasses.replace(absent, optional=False),)))
    with pytest.raises(DataError, match="letters: none of its sources exists"):
        pretrain._load_stage_data(dataclasses.replace(stage, sources=(absent,)))
