"""Mistakes in arguments are one line of ours, and values print as one line."""

import shutil

import pytest
import soundfile

import mowa
from mowa.adapters import merge
from mowa.adapters.checkpoint import MERGED_SUFFIX
from mowa.cli.main import main
from mowa.engines import onnx, registry
from mowa.errors import DataError, ModelError, RecipeError
from mowa.training.config import dispatch
from tests.checkpoints import clip, corpus, tiny
from tests.training.causal import chats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    tiny(folder / "speech", conv_dim=(8,) * 7, intermediate_size=32)
    chats.recipe(folder)
    corpus(folder / "corpus", 12)
    soundfile.write(folder / "a.wav", clip(0, 20_000), 16_000)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return mowa.load(folder / "speech")


# --- engines ----------------------------------------------------------------------------------------------------------


def test_an_onnx_engine_transcribes(folder, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path))
    engine = onnx.open_engine(model)
    expected = mowa.transcribe(folder / "a.wav", model, dtype="float32", vad_threshold=0.0)
    found = mowa.transcribe(folder / "a.wav", engine, vad_threshold=0.0)
    assert found.text == expected.text
    for option in ({"dtype": "int8"}, {"threads": 1}, {"target_lang": "pol"}):
        with pytest.raises(ModelError, match=f"the onnx engine is open already: give {next(iter(option))} where"):
            mowa.transcribe(folder / "a.wav", engine, **option)


@pytest.mark.parametrize("verb", ["transcribe", "stream"])
def test_what_is_no_model_is_named(folder, model, verb):
    for value in (3, model.net, object()):
        with pytest.raises(ModelError, match=f"a value of type {type(value).__name__} is no speech model"):
            mowa.transcribe(folder / "a.wav", value) if verb == "transcribe" else mowa.stream(value)


@pytest.mark.parametrize("name", ["ctranslate2", "onnx"])
def test_an_export_on_another_device_is_refused_as_what_it_is(tmp_path, name):
    with pytest.raises(ModelError) as error:
        registry.validate_device_and_dtype(registry.ENGINES.get(name), "cuda:1", "auto", export=tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is an export to {name}, which runs on cpu only: omit --device, or name the original model"
    )


def test_a_batch_job_with_an_export_of_a_local_checkpoint_resumes(folder, model, tmp_path):
    """The export has no weights file to identify the model by in the results log."""
    mowa.export(model, "onnx", out=tmp_path / "onnx")
    for _ in range(2):
        done = mowa.transcribe_corpus(folder / "a.wav", tmp_path / "log.jsonl", str(tmp_path / "onnx"))
        assert (done.recordings, done.failed) == (1, 0)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_may_be_a_string_and_the_second_argument(folder, tmp_path):
    manifest = str(folder / "corpus" / "train.jsonl")
    tree = {
        "model": str(folder / "speech"),
        "data": {"train": manifest, "dev": manifest},
        "batch": {"seconds": 4.0},
        "optimizer": {"max_steps": 1, "precision": "float32"},
    }
    run = mowa.train(tree, str(tmp_path / "run"), threads=1)
    assert run.folder == tmp_path / "run"
    recipe = dispatch.parse(tree, "test")
    assert dispatch.train(recipe, str(tmp_path / "run"), threads=1) == tmp_path / "run"
    with pytest.raises(RecipeError, match="name the folder of the run, out=FOLDER"):
        mowa.train(tree)


def test_conversations_for_a_speech_model_are_named(folder, tmp_path):
    data = str(folder / "chats.jsonl")
    with pytest.raises(DataError, match="has conversations or texts and no recordings: they train a language model"):
        mowa.train(model=str(folder / "speech"), data=data, out=tmp_path / "run")


def test_recordings_without_texts_for_a_language_model_are_named(folder, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"audio": "a.wav", "duration": 1.0}\n')
    with pytest.raises(DataError, match="has recordings: they train a speech model"):
        mowa.train(model=str(folder / "base"), data=str(tmp_path / "data.jsonl"), out=tmp_path / "run")


def test_other_mistakes_in_data_get_no_hint(folder, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"audio": "missing.wav", "text": "a"}\n')
    with pytest.raises(DataError) as error:
        mowa.train(model=str(folder / "speech"), data=str(tmp_path / "data.jsonl"), out=tmp_path / "run")
    assert "language model" not in str(error.value)


def test_a_merged_model_says_how_to_train_it_and_a_copy_claims_no_adapter(model, tmp_path):
    copied = merge.merge_adapter(model)
    assert not hasattr(copied.net, "mowa_adapter")
    copied.net.mowa_adapter = "adapter" + MERGED_SUFFIX
    with pytest.raises(ModelError, match=r"was merged in memory, .* mowa.merge\(.adapter., out=FOLDER\)"):
        mowa.train(model=copied, data="x", out=tmp_path)


@pytest.mark.parametrize("verb", ["train", "distill"])
def test_ctrl_c_says_how_to_resume(folder, tmp_path, capsys, monkeypatch, verb):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(mowa), verb, interrupted)
    checkpoint = tmp_path / "run" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete").touch()
    model = ["--model", "m"] if verb == "train" else ["m", "--student-layers", "2", "--dev", "b.jsonl"]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main([verb, *model, "--data", "a.jsonl", "-o", str(tmp_path)])
        assert end.value.code == 130
        hint, stopped = filter(None, capsys.readouterr().err.splitlines())
        assert stopped == "mowa: stopped"
        if checkpoint.is_dir():
            assert hint == f"mowa: the same command resumes from checkpoint 40 in {tmp_path}"
        else:
            assert hint == f"mowa: {tmp_path} has no checkpoint yet, so the same command starts again from step 0"
        shutil.rmtree(checkpoint, ignore_errors=True)


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_print_as_one_short_line(folder, model):
    transcript = mowa.transcribe(folder / "a.wav", model, dtype="float32", vad_threshold=0.0)
    for value in (transcript, model, mowa.load(folder / "base")):
        assert len(str(value)) < 300
        assert "\n" not in repr(value)
    assert transcript.text[:60] in repr(transcript)
    assert "family=wav2vec2" in repr(model)
    assert "parameters" in repr(model)
