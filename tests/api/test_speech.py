"""`mowa.transcribe` takes audio as Python programs hold it, and one bad recording does not stop the others."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import mowa
from mowa.data import audio
from mowa.data.audio.values import to_audio_source
from mowa.errors import AudioError
from mowa.io.hub import SAMPLE_CLIP
from tests.checkpoints import clip, tiny

RATE = 16_000


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return mowa.open_engine(mowa.load(tiny(tmp_path_factory.mktemp("net"))), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def wav(tmp_path_factory):
    file = tmp_path_factory.mktemp("audio") / "a b.wav"
    soundfile.write(file, clip(3, RATE), RATE, subtype="FLOAT")
    return file


def transcribe(audio, engine, **options):
    return mowa.transcribe(audio, engine, vad_threshold=0.0, **options)


def test_every_form_of_a_recording_gives_the_same_transcript(engine, wav):
    samples = clip(3, RATE)
    expected = transcribe(wav, engine)
    forms = [
        str(wav),
        wav.read_bytes(),
        io.BytesIO(wav.read_bytes()),
        {"path": str(wav)},
        {"bytes": wav.read_bytes(), "path": None},
        {"array": samples, "sampling_rate": RATE},
        {"array": samples.tolist(), "sampling_rate": RATE, "path": "x.wav"},
        {"audio": {"array": samples.astype(np.float64), "sampling_rate": RATE}, "text": "x"},
        {"raw": samples, "sampling_rate": RATE},
    ]
    for form in forms:
        assert transcribe(form, engine).segments == expected.segments
    with wav.open("rb") as file:
        assert transcribe(file, engine).segments == expected.segments
    for array in (samples, torch.from_numpy(samples), samples[None], np.stack([samples, samples])):
        assert transcribe(array, engine, sampling_rate=RATE).segments == expected.segments


def test_integer_samples_and_another_rate_equal_the_file(engine, tmp_path):
    samples = np.round(clip(4, 44_100) * 30_000).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", samples, 44_100, subtype="PCM_16")
    expected = transcribe(tmp_path / "x.wav", engine)
    assert transcribe(samples, engine, sampling_rate=44_100).segments == expected.segments


def test_several_recordings_are_an_iterator_in_order_with_failures(engine, wav, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF no audio")
    array = {"array": clip(5, RATE), "sampling_rate": RATE}
    found = list(transcribe((one for one in [wav, tmp_path / "bad.wav", array, 7, wav.parent]), engine))
    assert [type(one).__name__ for one in found] == ["Transcript", "Failure", "Transcript", "Failure", "Transcript"]
    assert found[0].segments == found[4].segments == transcribe(wav, engine).segments
    assert found[2].segments == transcribe(array, engine).segments
    assert found[3].file == "recording 4"
    assert "int is not audio" in str(found[3].error)


def test_values_that_raise_other_errors_are_failures(engine, wav):
    with wav.open("rb") as closed:
        pass
    found = list(transcribe([closed, {"array": [[1, 2], [3]], "sampling_rate": RATE}, "a\0b", wav], engine))
    assert [type(one).__name__ for one in found] == ["Failure"] * 3 + ["Transcript"]


def test_recordings_are_read_lazily(engine, wav):
    taken = []

    def recordings():
        for number in range(1000):
            taken.append(number)
            yield wav

    next(iter(transcribe(recordings(), engine, batch_s=1)))
    assert len(taken) < 100


def test_words_can_be_left_out(engine, wav):
    with_words, without = transcribe(wav, engine), transcribe(wav, engine, word_timestamps=False)
    assert with_words.words
    assert (without.text, without.words) == (with_words.text, ())


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (np.zeros(1000, np.float32), {}, "an array has no sampling rate"),
        (np.zeros(1000, np.float32), {"sampling_rate": 5}, "sampling_rate is 5"),
        (np.zeros((2, 3, 4), np.float32), {"sampling_rate": RATE}, r"shape \[2, 3, 4\] is not audio"),
        (np.full(1000, np.nan), {"sampling_rate": RATE}, "NaN or infinity"),
        (np.zeros(1000, np.uint8), {"sampling_rate": RATE}, "uint8 has no scale"),
        ({"text": "x"}, {}, "a row without audio"),
        (b"", {}, "audio"),
        (io.StringIO("x"), {}, "open as text"),
        (Path("."), {}, "is a folder"),
        (None, {}, "a value of type NoneType is not audio"),
        ([0.1, 0.2], {"sampling_rate": RATE}, "a list of numbers"),
    ],
)
def test_what_is_not_audio_is_one_clear_error(engine, audio, options, message):
    with pytest.raises(mowa.AudioError, match=message):
        transcribe(audio, engine, **options)


def test_a_model_by_name_uses_the_engine_of_the_command_line():
    assert mowa.transcribe(SAMPLE_CLIP).text == mowa.transcribe(SAMPLE_CLIP, "pl-tiny", engine="pytorch").text


def test_a_language_model_cannot_transcribe(tmp_path):
    from tests.training.causal import chats

    model = mowa.load(chats.model(tmp_path / "causal"))
    with pytest.raises(mowa.ModelError, match=r"is a language model .* transcribe needs a speech model"):
        mowa.transcribe(SAMPLE_CLIP, model)


def test_float_arrays_of_16_bit_values_are_divided_with_a_warning(caplog):
    samples = np.round(clip(4, 16_000) * 30_000)
    source = to_audio_source(samples.astype(np.float32), sampling_rate=RATE, name="an array of whole numbers")
    assert np.array_equal(audio.load_audio(source, RATE), samples.astype(np.float32) / np.float32(32768))
    assert "an array of whole numbers: has floats that reach" in caplog.text
    row = to_audio_source({"audio": {"array": samples, "sampling_rate": RATE}})
    assert np.abs(audio.load_audio(row, RATE)).max() <= 1


def test_float_arrays_of_another_scale_raise():
    with pytest.raises(AudioError, match=r"the array reaches 1e\+06; full scale is 1"):
        to_audio_source(np.full(1000, 1e6, np.float32), sampling_rate=RATE)
    overshoot = to_audio_source(np.full(1000, 1.5, np.float32), sampling_rate=RATE)
    assert audio.load_audio(overshoot, RATE).max() == 1.5
