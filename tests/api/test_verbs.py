"""Every verb of `mowa` works twice in a row after every submodule was imported; options are those of the settings."""

import importlib
import json
import pkgutil
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForCTC

import mowa
from mowa.api import options
from mowa.engines.settings import EngineSpec, GenerationSettings, TranscriptionSettings
from mowa.engines.streaming import StreamingConfig
from tests.checkpoints import clip, corpus, tiny
from tests.training.causal import chats

STEPS = {"max_steps": 2, "eval_steps": 2, "precision": "float32"}
TWICE = pytest.mark.parametrize("attempt", [1, 2])


@pytest.fixture(scope="module", autouse=True)
def _every_submodule():
    for module in pkgutil.walk_packages(mowa.__path__, "mowa."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("speech"), conv_dim=(8,) * 7, intermediate_size=32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return chats.model(tmp_path_factory.mktemp("text") / "base")


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    return chats.conversations(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def run(speech, recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "adapter"
    return mowa.train(model=speech, data=recordings, dev=recordings, method="lora", out=out, threads=1, **STEPS)


@TWICE
def test_load(attempt, speech, text):
    assert isinstance(
        mowa.load(speech, task="ctc").net, AutoModelForCTC._model_mapping[type(mowa.load(speech).net.config)]
    )
    assert (mowa.load(speech).task, mowa.load(text).task) == ("ctc", "causal")
    with pytest.raises(mowa.ModelError, match="not a speech model"):
        mowa.load(text, task="ctc")


@TWICE
def test_transcribe_and_stream(attempt, speech, run):
    found = mowa.transcribe(clip(0, 20_000), speech, sampling_rate=16_000, vad_threshold=0)
    adapted = mowa.transcribe(clip(0, 20_000), run, sampling_rate=16_000, vad_threshold=0)
    assert found.text
    assert adapted.model != found.model
    stream = mowa.stream(speech, mode="window", chunk_s=0.5, endpointing=mowa.EndpointConfig(vad=False))
    events = [*stream.feed(clip(0, 20_000)), *stream.close()]
    assert any(event.text for event in events)


@TWICE
def test_transcribe_corpus(attempt, speech, recordings, tmp_path):
    log = tmp_path / "log.jsonl"
    found = mowa.transcribe_corpus(recordings, log, str(speech), vad_threshold=0)
    again = mowa.transcribe_corpus([recordings], log, str(speech), vad_threshold=0)
    assert (found.recordings, found.failed) == (again.recordings, again.failed) == (8, 0)


@TWICE
def test_generate(attempt, text):
    answer = mowa.generate(text, "how are you", max_new_tokens=4, temperature=0)
    pieces = list(mowa.generate(text, "how are you", max_new_tokens=4, temperature=0, stream=True))
    assert answer.text == "".join(pieces)
    several = mowa.generate(
        text, ["how are you", [{"role": "user", "content": "this"}]], max_new_tokens=4, temperature=0
    )
    assert several[0].text == answer.text
    (one,) = mowa.generate(mowa.load(text), ["how are you"], max_new_tokens=4, temperature=0)
    assert one.text == answer.text


@TWICE
def test_train_merge_evaluate_and_export(attempt, run, recordings, tmp_path):
    again = mowa.train(run.folder / "recipe.yaml", out=run.folder)
    assert again.report == run.report
    assert run.metrics["dev"]["recordings"] == 8 if "dev" in run.metrics else run.metrics
    merged = mowa.merge(run)
    values = torch.from_numpy(clip(1, 9_000))[None]
    torch.testing.assert_close(merged.net(values).logits, run.model.net(values).logits, atol=1e-5, rtol=0)
    seen = []
    written = mowa.merge(run.folder, out=tmp_path / "merged", on_comparison=lambda label, diff: seen.append(label))
    assert len(seen) >= 1
    torch.testing.assert_close(written.net(values).logits, merged.net(values).logits, atol=1e-5, rtol=0)
    with pytest.raises(mowa.ModelError, match="name the folder"):
        mowa.merge(merged, out=tmp_path / "again")
    found = mowa.evaluate(run, recordings, engine="pytorch", dtype="float32", vad_threshold=0)
    assert found.metrics["wer"].low <= found.metrics["wer"].value <= found.metrics["wer"].high
    small = mowa.quantize(run, "int8")
    assert (small.scheme.weights, merged.scheme.weights) == ("int8", "float32")
    artifact = mowa.export(merged, "safetensors", tmp_path / "export", scheme="fp16")
    assert mowa.evaluate(artifact.folder, recordings, vad_threshold=0).samples == 8


@TWICE
def test_a_language_model_is_trained_merged_and_evaluated(attempt, text, talk, tmp_path):
    base = mowa.evaluate(text, talk)
    run = mowa.train(
        model=text, data=talk, dev=talk, method="lora", out=tmp_path / "run", threads=1, learning_rate=1e-2, **STEPS
    )
    tuned = mowa.evaluate(run, talk)
    assert tuned.metrics["loss"].value < base.metrics["loss"].value
    merged = mowa.merge(run, out=tmp_path / "merged")
    assert mowa.evaluate(merged, talk).metrics["loss"].value == pytest.approx(tuned.metrics["loss"].value, rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert mowa.generate(run, "how are you", max_new_tokens=2).completion_tokens <= 2


@TWICE
def test_distill(attempt, speech, recordings, tmp_path):
    run = mowa.distill(speech, 1, out=tmp_path / "half", data=recordings, dev=recordings, threads=1, **STEPS)
    assert run.model.net.config.num_hidden_layers == 1


@TWICE
def test_accelerate_and_restore(attempt, text):
    net = AutoModelForCausalLM.from_pretrained(text)
    ids = torch.arange(1, 9)[None]
    before = net(ids).logits
    assert mowa.accelerate(net)
    torch.testing.assert_close(net(ids).logits, before, atol=1e-4, rtol=1e-4)
    mowa.restore(net)
    assert torch.equal(net(ids).logits, before)


@pytest.mark.slow
@TWICE
def test_bench(attempt, speech):
    (found,) = mowa.bench(str(speech), max_samples=1)
    assert found.error == ""
    assert found.rtf > 0


def test_options_are_the_fields_of_the_settings():
    def names(kind):
        return {field.name for field in fields(kind)}

    assert options.TranscriptionOptions.__annotations__.keys() == names(TranscriptionSettings)
    assert options.StreamingOptions.__annotations__.keys() == names(StreamingConfig)
    assert options.GenerationOptions.__annotations__.keys() == names(GenerationSettings)
    assert options.EngineOptions.__annotations__.keys() == names(EngineSpec) - {"model"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": -1}, "max_samples is -1: it must be a whole number, at least 0"),
        ({"max_length": 1}, "max_length is 1: it must be a whole number of tokens, at least 2"),
        ({"max_length": 100_000}, "max_length is 100,000 tokens, and .*base reads at most 2,048"),
    ],
)
def test_evaluate_rejects_sizes_out_of_range(text, talk, options, message):
    with pytest.raises(mowa.DataError, match=message):
        mowa.evaluate(text, talk, **options)


def test_unreadable_recordings_are_failures_of_an_evaluation(speech, recordings, tmp_path):
    with pytest.raises(mowa.DataError, match="max_samples is -1"):
        mowa.evaluate(speech, recordings, max_samples=-1)
    (tmp_path / "noise.wav").write_bytes(b"noise")
    rows = [{"audio": str(tmp_path / "noise.wav"), "text": "a"}, {"audio": str(tmp_path / "gone.wav"), "text": "b"}]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(mowa.DataError, match="none of the 2 recordings could be read"):
        mowa.evaluate(speech, table)


def test_a_scheme_is_a_scheme_of_quantize(text):
    by_name = mowa.quantize(text, "int8-weight")
    assert mowa.quantize(text, by_name.scheme).scheme == by_name.scheme


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda speech, text: mowa.generate(speech, "x"), "is a speech model .* generate needs a language model"),
        (lambda speech, text: mowa.transcribe(clip(0, 9_000), text, sampling_rate=16_000), "not a speech model"),
        (lambda speech, text: mowa.stream(mowa.load(text)), "is a language model"),
        (lambda speech, text: mowa.export(text, "onnx", "never"), "language model"),
        (lambda speech, text: mowa.load(speech, accelerate=True), "language models only"),
        (lambda speech, text: mowa.load(speech, adapter="nowhere"), "nowhere"),
        (lambda speech, text: mowa.merge(mowa.load(text), dtype="float8"), "dtype 'float8' is not one of float32"),
        (lambda speech, text: mowa.merge(text, out="never", dtype="int8"), "dtype 'int8' is not one of float32"),
        (lambda speech, text: mowa.merge(None), "expected a model, its name or folder, or a Run, not NoneType"),
        (lambda speech, text: mowa.merge(None, out="never"), "expected a run or the folder of an adapter"),
        (lambda speech, text: mowa.quantize(3), "expected a model, its name or folder, or a Run, not int"),
        (lambda speech, text: mowa.quantize(text, None), "expected a name such as int8, or a Scheme, not NoneType"),
        (lambda speech, text: mowa.export(None, "safetensors", "never"), "expected a model, .* not NoneType"),
        (lambda speech, text: mowa.evaluate(None, "never"), "expected a model, .* not NoneType"),
        (lambda speech, text: mowa.evaluate(mowa.load(text), "x", device="cpu"), "loaded already: give device to"),
        (lambda speech, text: mowa.evaluate(mowa.load(text), "x", dtype="float32"), "loaded already: give dtype to"),
        (lambda speech, text: mowa.evaluate(mowa.load(speech), "x", revision="a"), "loaded already: give revision to"),
        (lambda speech, text: mowa.evaluate(mowa.load(text), "x", target_lang="pol"), "give target_lang to mowa.load"),
        (lambda speech, text: mowa.evaluate(text, "x", engine="onnx"), "engine 'onnx' does not run language models"),
        (lambda speech, text: mowa.evaluate(text, "x", threads=0), "threads is 0"),
        (lambda speech, text: mowa.evaluate(speech, "x", train_on="all"), "train_on is an option of language models"),
    ],
)
def test_what_a_task_cannot_do_is_refused(speech, text, call, message):
    with pytest.raises(mowa.ModelError, match=message):
        call(speech, text)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda speech, text: mowa.transcribe("x.wav", speech, langauge="pl"), "transcribe has no option 'langauge'"),
        (lambda speech, text: mowa.transcribe("x.wav", speech, vad_treshold=0), r"did you mean vad_threshold\?"),
        (lambda speech, text: mowa.stream(speech, chunks_s=1), r"did you mean chunk_s\?"),
        (lambda speech, text: mowa.evaluate(speech, "x", devise="cpu"), r"did you mean device\?"),
        (lambda speech, text: mowa.evaluate(text, "x", window_s=3), "window_s do not apply"),
        (lambda speech, text: mowa.generate(text, "x", max_tokens=3), r"did you mean max_new_tokens\?"),
    ],
)
def test_unknown_options_name_the_closest(speech, text, call, message):
    with pytest.raises(mowa.ModelError, match=message):
        call(speech, text)
