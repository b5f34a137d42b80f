"""Transcribe whole recordings with the bundled model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr

import mowa
from mowa.data import audio
from mowa.decode.captions import build_cues
from mowa.engines import protocol
from mowa.errors import AudioError, ModelError
from mowa.io.hub import SAMPLE_CLIP as SAMPLE
from mowa.tasks.metrics import error_rates
from mowa.types import Failure
from tests.checkpoints import tiny

REFERENCE = json.loads(SAMPLE.with_suffix(".json").read_text())["text"]


@pytest.fixture(scope="module")
def engine():
    return mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32")


def test_the_sample_is_transcribed(engine):
    transcript = mowa.transcribe(SAMPLE, engine)
    assert error_rates([REFERENCE], [transcript.text])["cer"] < 0.15
    assert len(transcript.segments) == 1
    assert transcript.model == "pl-tiny"


def test_long_recordings_are_transcribed_like_their_parts(engine, tmp_path):
    """Five times the sample with pauses, split into windows: the same words, each time a period later."""
    sample = audio.load_audio(SAMPLE)
    pause = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 1e-4
    long = np.concatenate([np.concatenate([sample, pause])] * 5)
    soundfile.write(tmp_path / "long.wav", long, 16_000, subtype="FLOAT")
    transcript = mowa.transcribe(tmp_path / "long.wav", engine, window_s=12.0)
    single = mowa.transcribe(SAMPLE, engine)
    assert len(transcript.segments) > 2
    # the context of windows differs, and so may single characters; a lost or repeated window would be a tenth
    assert error_rates([" ".join([single.text] * 5)], [transcript.text])["cer"] < 0.04
    period_s = (len(sample) + len(pause)) / 16_000
    in_every_part = [word for word in single.words if [w.text for w in transcript.words].count(word.text) == 5]
    assert len(in_every_part) > 15
    for word in in_every_part:
        starts_s = [found.start_s for found in transcript.words if found.text == word.text]
        assert starts_s == pytest.approx([part * period_s + word.start_s for part in range(5)], abs=0.1)


def test_a_language_without_spaces_is_split_like_any_other(engine, tmp_path):
    """The words of a vocabulary without a delimiter are its characters, and the text is the same without spaces."""
    spaced = mowa.load("pl-tiny")
    vocabulary = spaced.vocabulary
    unspaced = replace(vocabulary, delimiter=None, specials=vocabulary.specials | {vocabulary.delimiter})
    model = replace(spaced, processor=replace(spaced.processor, vocabulary=unspaced))
    sample = audio.load_audio(SAMPLE)
    pause = np.zeros(16_000, np.float32)
    soundfile.write(tmp_path / "long.wav", np.concatenate([sample, pause] * 3), 16_000)
    transcript = mowa.transcribe(tmp_path / "long.wav", model, window_s=12.0)
    assert len(transcript.segments) > 2
    assert transcript.text == "".join(word.text for word in transcript.words)
    assert all(len(word.text) == 1 for word in transcript.words)
    cues = build_cues(transcript)
    assert all(cue.end_s - cue.start_s < 7.001 for cue in cues)
    assert "".join(line for cue in cues for line in cue.lines) == transcript.text
    assert len(cues) >= len(build_cues(mowa.transcribe(tmp_path / "long.wav", engine, window_s=12.0))) // 2


def test_containers_and_sample_rates(engine, tmp_path):
    sample = audio.load_audio(SAMPLE)
    for rate_hz, name in ((44_100, "a.ogg"), (48_000, "a.mp3"), (22_050, "a.flac"), (8_000, "a.wav")):
        soundfile.write(tmp_path / name, soxr.resample(sample, 16_000, rate_hz), rate_hz)
        transcript = mowa.transcribe(tmp_path / name, engine)
        assert error_rates([REFERENCE], [transcript.text])["cer"] < (0.15 if rate_hz > 8_000 else 0.5)


def test_outcomes_keep_order_around_failures(engine, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"")
    outcomes = list(mowa.transcribe([SAMPLE, tmp_path / "bad.wav", SAMPLE], engine))
    assert [type(outcome) for outcome in outcomes][1] is Failure
    assert outcomes[0].text == outcomes[2].text
    assert "bad.wav" in str(outcomes[1].error)


def test_progress_counts_every_second(engine):
    seconds = []
    outcomes = list(mowa.transcribe([SAMPLE, SAMPLE], engine, batch_s=5.0, on_progress=seconds.append))
    assert sum(seconds) == pytest.approx(sum(outcome.duration_s for outcome in outcomes))


def test_folder_needs_a_list(engine, tmp_path):
    with pytest.raises(AudioError, match="list"):
        mowa.transcribe(tmp_path, engine)


def test_bfloat16_is_close_to_float32():
    half = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="bfloat16")
    assert half.batch_policy is protocol.BatchPolicy.SINGLE
    transcript = mowa.transcribe(SAMPLE, half)
    assert error_rates([REFERENCE], [transcript.text])["cer"] < 0.2


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "int3"), ("cuda:7", "auto"), ("toaster", "auto")])
def test_unavailable_devices_and_dtypes_are_named(device, dtype):
    with pytest.raises(ModelError, match=dtype if dtype != "auto" else device):
        mowa.open_engine(mowa.load("pl-tiny"), device=device, dtype=dtype)


@pytest.mark.parametrize("policy", list(protocol.BatchPolicy))
def test_batches_hold_every_clip_once(policy):
    lengths = [400, 800, 400, 1600, 1600, 100_000, 1600]
    groups = protocol.batch_by_length(lengths, 4000, policy)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert len(group) == 1 or longest * len(group) <= 4000
        if policy is protocol.BatchPolicy.EQUAL_LENGTH:
            assert len({lengths[index] for index in group}) == 1
        if policy is protocol.BatchPolicy.SINGLE:
            assert len(group) == 1


@pytest.mark.parametrize("samples", [400, 700, 1039, 1040])
def test_shorter_than_the_first_frame_is_silence(engine, tmp_path, samples):
    """The receptive field of a frame is 1040 samples in pl-tiny, 400 in wav2vec2."""
    noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32) / 10
    soundfile.write(tmp_path / "short.wav", noise, 16_000)
    transcript = mowa.transcribe(tmp_path / "short.wav", engine, vad_threshold=0.0)
    assert transcript.duration_s == samples / 16_000
    assert transcript.text == "" or samples >= 1040


@pytest.fixture(scope="module")
def telephone_engine(tmp_path_factory):
    """A net with random weights for 8 kHz, as checkpoints for telephone speech are."""
    folder = tiny(tmp_path_factory.mktemp("telephone"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sampling_rate": 8_000}))
    return mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype="float32")


def test_models_of_8_khz_transcribe_recordings_of_any_rate(telephone_engine):
    assert telephone_engine.preprocessing.rate_hz == 8_000
    for rate_hz in (8_000, 16_000):
        sound = np.random.default_rng(0).standard_normal(3 * rate_hz).astype(np.float32) * 0.1
        transcript = mowa.transcribe(sound, telephone_engine, sampling_rate=rate_hz, vad_threshold=0.0)
        assert transcript.duration_s == pytest.approx(3.0, abs=0.001)
        assert transcript.words[-1].end_s <= 3.0


def test_models_of_8_khz_transcribe_live_audio(telephone_engine):
    speech = audio.load_audio(SAMPLE, 8_000)
    stream = mowa.stream(telephone_engine)
    events = [*stream.feed(speech), *stream.close()]
    assert stream.received_s == pytest.approx(len(speech) / 8_000)
    first_s = next(event.words[0].start_s for event in events if event.words)
    offline = mowa.transcribe(SAMPLE, telephone_engine)
    assert first_s == pytest.approx(offline.words[0].start_s, abs=0.5)
    assert any(event.is_endpoint for event in events)


@pytest.mark.parametrize("mode", ["cached", "window"])
def test_the_first_words_of_a_soft_voice_are_transcribed_live(engine, mode):
    """The sample at -68 dBFS, whose first second the detector did not find."""
    speech = audio.load_audio(SAMPLE)
    padded = np.concatenate([np.zeros(16_000, np.float32), speech * np.float32(0.01), np.zeros(16_000, np.float32)])
    padded += 10 ** (-90 / 20) * np.random.default_rng(0).standard_normal(len(padded)).astype(np.float32)
    stream = mowa.stream(engine, mode=mode)
    words = [word for event in [*stream.feed(padded), *stream.close()] if event.is_final for word in event.words]
    expected = mowa.transcribe(SAMPLE, engine)
    assert words[0].start_s == pytest.approx(1.0 + expected.words[0].start_s, abs=0.1)
    assert error_rates([expected.text], [" ".join(word.text for word in words)])["cer"] < 0.04
