"""Train with chunked attention: chunks are applied in every batch, and the result streams with `mowa.stream`."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mowa
from mowa import loading
from mowa.data import audio
from mowa.data.audio import running_norm
from mowa.decode.stream import EndpointConfig
from mowa.engines.streaming import StreamingConfig, create_streaming_encoder
from mowa.errors import RecipeError
from mowa.models.ctc_encoder import chunk_mask
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig, TrainedChunking, apply_chunk_mask
from mowa.training import loop, optimizer
from mowa.training.config import ctc, dispatch, schema
from mowa.training.config.ctc import ChunkedTraining, CTCRecipe
from mowa.training.ctc import setup, streaming, trainer
from mowa.training.ctc.batches import BatchDataset
from mowa.training.ctc.module import CTCModule, build_compute_loss
from mowa.training.gradient_checkpointing import set_gradient_checkpointing
from tests.checkpoints import clip, corpus, tiny

NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "final")}
# Frames of 0.02 s, as those of wav2vec2, from a small front end.
SMALL = {"conv_dim": (8,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "intermediate_size": 32}
STREAMING = {"chunk_s": [0.1, 0.2, "full"], "left_context_s": 1.0, "lookahead_s": [0.0, 0.04]}
SHORT = {
    "optimizer.max_steps": 4,
    "optimizer.learning_rate": 1e-3,
    "optimizer.precision": "float32",
    "batch.seconds": 6.0,
    "evaluation.eval_steps": 2,
    "data.max_eval_samples": 4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), **SMALL, **NO_DROPOUT, layerdrop=0.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), 12)


def make_recipe(base, manifest, **overrides):
    tree = {"model": str(base), "data": {"train": manifest, "dev": manifest}, "streaming": STREAMING}
    return ctc.parse(schema.apply_overrides(tree, SHORT | overrides), "test")


def run(recipe, out):
    return dispatch.train(recipe, out, threads=1)


def make_module(base, manifest, tmp_path, **overrides):
    """Return the module that is trained, and its training batches."""
    run = loop.prepare(trainer.TASK, make_recipe(base, manifest, **overrides), loading.load(str(base)), tmp_path)
    module = CTCModule(run.model.net, packing=False, use_attention_mask=True, chunks=run.chunks)
    options = dataclasses.replace(setup.eval_batch_options(run), chunks=run.chunks)
    return module.train(), BatchDataset(run.batches, options)


# Chunk lengths ------------------------------------------------------------------------------------------------------


def test_seconds_become_frames_of_the_net(base):
    net = loading.load(str(base)).net
    schedule = streaming.resolve_schedule(ChunkedTraining((0.1, 0.2, math.inf), 1.0, (0.0, 0.04)), net, 16_000)
    assert schedule.chunk_sizes == (5, 10, 0)
    assert (schedule.left_context, schedule.lookaheads) == (50, (0, 2))
    assert schedule.trained_chunking() == TrainedChunking((5, 10), 50, (0, 2))
    assert streaming.resolve_schedule(ChunkedTraining(), net, 16_000) is None
    assert streaming.resolve_schedule(ChunkedTraining((0.32,)), net, 16_000).left_context is None


def test_every_batch_draws_its_lengths_from_the_seed_and_its_index(base, manifest, tmp_path):
    _, data = make_module(base, manifest, tmp_path, **{"optimizer.max_steps": 30})
    drawn = [(int(data[index]["chunk_frames"]), int(data[index]["lookahead_frames"])) for index in range(30)]
    assert drawn == [(int(data[index]["chunk_frames"]), int(data[index]["lookahead_frames"])) for index in range(30)]
    assert set(drawn) == {(5, 0), (5, 2), (10, 0), (10, 2), (0, 0)}
    reseeded = BatchDataset(data.batches, dataclasses.replace(data.options, seed=1))
    assert drawn != [(int(reseeded[i]["chunk_frames"]), int(reseeded[i]["lookahead_frames"])) for i in range(30)]


def test_batches_in_chunks_are_normalized_as_live_audio(base, manifest, tmp_path):
    _, data = make_module(base, manifest, tmp_path, **{"optimizer.max_steps": 30})
    for index in range(30):
        item, (example, *_) = data[index], data.batches[index]
        samples = audio.load_audio(example.audio, 16_000)
        values = item["input_values"][0, : int(item["lengths"][0])].numpy()
        if int(item["chunk_frames"]):
            assert not np.allclose(values, audio.normalize(samples), atol=1e-3)
            level = values[: running_norm.BLOCK_SAMPLES] / samples[: running_norm.BLOCK_SAMPLES]  # before any sound
            assert level.std() < 1e-3 * abs(level.mean())
        else:
            np.testing.assert_allclose(values, audio.normalize(samples), atol=1e-5)


def test_evaluation_uses_the_smallest_chunk_and_the_level_of_a_stream():
    schedule = streaming.ChunkSchedule((0, 10, 5), (0, 2, 7), 50, 4.0).for_evaluation()
    assert schedule == streaming.ChunkSchedule((5,), (2,), 50, None)
    samples, rng = clip(0, 16_000), np.random.default_rng(0)
    expected, _ = running_norm.normalize_running(samples, running_norm.RunningStats.prior())
    np.testing.assert_array_equal(schedule.normalize(samples, rng, 16_000), expected)


# The mask -----------------------------------------------------------------------------------------------------------


def test_logits_equal_those_of_the_chunk_mask_and_differ_from_full_context(base, manifest, tmp_path):
    module, data = make_module(base, manifest, tmp_path)
    item = data[0]
    labels = item.pop("labels")
    values, lengths = item["input_values"], item["lengths"]
    mask = (torch.arange(values.shape[1]) < lengths[:, None]).long()
    net, compute_loss = loading.load(str(base)).net, build_compute_loss(0)
    full = net(values, attention_mask=mask).logits
    losses = []
    for size, lookahead in ((5, 2), (10, 0), (0, 0)):
        lengths = {"chunk_frames": torch.tensor([size]), "lookahead_frames": torch.tensor([lookahead])}
        out = module(**item | lengths)
        losses.append(float(compute_loss(out, labels).detach()))
        with apply_chunk_mask(net, ChunkConfig(size, 50, lookahead) if size else None):
            expected = net(values, attention_mask=mask).logits
        for row, frames in enumerate(out["num_frames"].tolist()):
            torch.testing.assert_close(out["logits"][row, :frames], expected[row, :frames], rtol=1e-4, atol=1e-4)
        assert ((out["logits"] - full).abs().max() > 0.05) == (size > 0)
    assert len({round(loss, 3) for loss in losses}) == 3


def test_gradient_checkpointing_recomputes_blocks_in_chunks(base, manifest, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        module, data = make_module(base, manifest, tmp_path)
        if checkpointing:
            set_gradient_checkpointing(module.net)
        item = data[0] | {"chunk_frames": torch.tensor([5]), "lookahead_frames": torch.tensor([2])}
        del item["labels"]
        module(**item)["logits"].square().mean().backward()
        gradients.append({name: p.grad for name, p in module.net.named_parameters() if p.grad is not None})
        module.remove_chunk_mask()
    stored, recomputed = gradients
    assert stored.keys() == recomputed.keys()
    for name, gradient in stored.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_mask_is_removed_from_the_net(base, manifest, tmp_path):
    module, data = make_module(base, manifest, tmp_path)
    net = module.net
    values = torch.from_numpy(clip(0, 16_000))[None]
    before = net.eval()(values).logits
    item = data[0] | {"chunk_frames": torch.tensor([5]), "lookahead_frames": torch.tensor([0])}
    del item["labels"]
    module.train()(**item)
    assert not torch.allclose(net.eval()(values).logits, before)
    module.remove_chunk_mask()
    assert torch.equal(net(values).logits, before)
    module.eval()(**item)
    assert torch.equal(net(values).logits, before)


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_fine_tuned_checkpoint_streams(base, manifest, tmp_path):
    out = run(make_recipe(base, manifest), tmp_path / "out")
    model = loading.load(str(out))
    assert chunk_mask.get_trained_chunking(model.net.config) == TrainedChunking((5, 10), 50, (0, 2))
    assert chunk_mask.get_trained_chunking(loading.load(str(base)).net.config) is None
    metrics = json.loads((out / "report.json").read_text())["metrics"]
    assert metrics.keys() == {"dev", "dev-streaming"}
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_dev-streaming_wer" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "eval_dev_wer" in row] == [0, 2, 4]
    samples = clip(1, 32_000)
    stream = mowa.stream(model, mode="cached", chunk_s=0.1, endpointing=EndpointConfig(vad=False))
    assert [event for event in (*stream.feed(samples), *stream.close())]
    encoder = create_streaming_encoder(mowa.open_engine(model, device="cpu", dtype="float32"), StreamingConfig("auto"))
    assert (encoder.lookahead_frames, encoder.left_frames) == (2, 50)


def test_an_interrupted_run_resumes_to_the_same_bits(base, manifest, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "lr_lambda", lambda config, steps: lambda step: interrupt() if step > 2 else 1.0)
        with pytest.raises(KeyboardInterrupt):
            run(make_recipe(base, manifest, **{"optimizer.lr_scheduler": "constant"}), tmp_path / "interrupted")
    assert (tmp_path / "interrupted" / "run" / "checkpoint-2" / "complete").is_file()
    monkeypatch.setattr(optimizer, "lr_lambda", lambda config, steps: lambda step: 1.0)
    recipe = make_recipe(base, manifest, **{"optimizer.lr_scheduler": "constant"})
    resumed, whole = run(recipe, tmp_path / "interrupted"), run(recipe, tmp_path / "whole")
    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_the_mark_of_a_streaming_checkpoint_is_dropped_where_its_encoder_is_trained_at_full_context(base, manifest):
    def prepare(**overrides):
        model = loading.load(str(base))
        chunk_mask.set_trained_chunking(model.net.config, before)
        run = loop.prepare(trainer.TASK, make_recipe(base, manifest, **overrides), model, base)
        return chunk_mask.get_trained_chunking(run.model.net.config), "\n".join(run.notes)

    before = TrainedChunking((16,), None, (0, 8))
    for method in ("full", "encoder", "top-1"):
        trained, notes = prepare(streaming={}, method=method)
        assert trained is None
        assert "was trained for streaming, and this run trains it at full context" in notes
    assert prepare(streaming={}, method="head") == (before, "")
    trained, notes = prepare(streaming={}, method="lora")
    assert trained == before
    assert "this adapter is trained at full context" in notes
    assert prepare() == (before, "")  # until the run is saved


def test_what_cannot_stream_is_refused(manifest, tmp_path):
    group = tiny(tmp_path / "group", norm="group", **{name: value for name, value in SMALL.items()})
    with pytest.raises(RecipeError, match=r"^streaming: this checkpoint cannot stream: its front end"):
        run(make_recipe(group, manifest), tmp_path / "out")
    coarse = tiny(tmp_path / "coarse", **SMALL | {"conv_stride": (5, 8, 32)})
    with pytest.raises(RecipeError, match=r"chunk_s: 0.03 is shorter than a frame of the net \(0.08 s\)"):
        run(make_recipe(coarse, manifest, **{"streaming.chunk_s": [0.03]}), tmp_path / "out2")


def test_packed_batches_are_refused_however_the_recipe_was_made(base, manifest, tmp_path):
    recipe = make_recipe(base, manifest)
    packed = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, packing=True))
    with pytest.raises(RecipeError, match="chunks are not applied to packed batches; set batch: packing: false"):
        run(packed, tmp_path / "out")
    assert isinstance(packed, CTCRecipe)
    with pytest.raises(ValueError, match="not applied to packed batches"):
        CTCModule(None, packing=True, use_attention_mask=True, chunks=streaming.ChunkSchedule((5,)))
