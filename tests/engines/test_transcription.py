"""Whole recordings through the bundled model: real speech sounds, real words."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

import mowa
from mowa.data import audio
from mowa.engines import protocol
from mowa.engines.transcription import Failure, TranscriptionSettings
from mowa.errors import AudioError, ModelError
from mowa.tasks.metrics import error_rates

SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"
SAID = json.loads(SAMPLE.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def engine():
    return mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32")


def test_sample_is_understood(engine):
    heard = mowa.transcribe(SAMPLE, engine)
    assert error_rates([SAID["said"]], [heard.text])["cer"] < 0.15
    assert len(heard.segments) == 1
    assert heard.model == "pl-tiny"


def test_long_recordings_say_what_their_parts_say(engine, tmp_path):
    """Five times the sample with pauses, cut into windows: every part reads as the sample alone does."""
    sample = audio.load_audio(SAMPLE)
    pause = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 1e-4
    long = np.concatenate([np.concatenate([sample, pause])] * 5)
    soundfile.write(tmp_path / "long.wav", long, 16_000, subtype="FLOAT")
    heard = mowa.transcribe(tmp_path / "long.wav", engine, window_s=12.0)
    alone = mowa.transcribe(SAMPLE, engine)
    assert len(heard.segments) > 2
    # context differs by window, and so does a letter here and there; a lost or doubled stretch would be a tenth
    assert error_rates([" ".join([alone.text] * 5)], [heard.text])["cer"] < 0.04
    # Every part starts where it starts: the same words, each time a period later.
    period_s = (len(sample) + len(pause)) / 16_000
    if len(heard.words) == 5 * len(alone.words):
        for index, word in enumerate(heard.words):
            part, place = divmod(index, len(alone.words))
            assert word.start_s == pytest.approx(part * period_s + alone.words[place].start_s, abs=0.1)


def test_container_and_rate_hardly_matter(engine, tmp_path):
    sample = audio.load_audio(SAMPLE)
    for rate_hz, name in ((44_100, "a.ogg"), (48_000, "a.mp3"), (22_050, "a.flac"), (8_000, "a.wav")):
        soundfile.write(tmp_path / name, soxr.resample(sample, 16_000, rate_hz), rate_hz)
        heard = mowa.transcribe(tmp_path / name, engine)
        assert error_rates([SAID["said"]], [heard.text])["cer"] < (0.15 if rate_hz > 8_000 else 0.5)


def test_outcomes_keep_order_around_failures(engine, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"")
    outcomes = list(mowa.iter_transcripts([SAMPLE, tmp_path / "bad.wav", SAMPLE], engine))
    assert [type(outcome) for outcome in outcomes][1] is Failure
    assert outcomes[0].text == outcomes[2].text
    with pytest.raises(AudioError, match=r"bad\.wav"):
        mowa.transcribe([SAMPLE, tmp_path / "bad.wav"], engine)


def test_progress_counts_every_second(engine):
    seconds = []
    outcomes = list(
        mowa.iter_transcripts([SAMPLE, SAMPLE], engine, TranscriptionSettings(batch_s=5.0), on_progress=seconds.append)
    )
    assert sum(seconds) == pytest.approx(sum(outcome.duration_s for outcome in outcomes))


def test_folder_needs_a_list(engine, tmp_path):
    with pytest.raises(AudioError, match="list"):
        mowa.transcribe(tmp_path, engine)


def test_bfloat16_hears_nearly_the_same():
    half = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="bfloat16")
    assert half.batch_policy is protocol.BatchPolicy.SINGLE
    heard = mowa.transcribe(SAMPLE, half)
    assert error_rates([SAID["said"]], [heard.text])["cer"] < 0.2


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "int3"), ("cuda:7", "auto"), ("toaster", "auto")])
def test_wrong_places_are_named(device, dtype):
    with pytest.raises(ModelError, match=dtype if dtype != "auto" else device):
        mowa.open_engine(mowa.load("pl-tiny"), device=device, dtype=dtype)


@pytest.mark.parametrize("sharing", list(protocol.BatchPolicy))
def test_batches_hold_every_clip_once(sharing):
    lengths = [400, 800, 400, 1600, 1600, 100_000, 1600]
    groups = protocol.batch_by_length(lengths, 4000, sharing)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert len(group) == 1 or longest * len(group) <= 4000
        if sharing is protocol.BatchPolicy.EQUAL_LENGTH:
            assert len({lengths[index] for index in group}) == 1
        if sharing is protocol.BatchPolicy.SINGLE:
            assert len(group) == 1


@pytest.mark.parametrize("samples", [400, 700, 1039, 1040])
def test_shorter_than_the_first_frame_is_silence(engine, tmp_path, samples):
    """pl-tiny's first frame is made of 1040 samples, wav2vec2's of 400."""
    noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32) / 10
    soundfile.write(tmp_path / "short.wav", noise, 16_000)
    heard = mowa.transcribe(tmp_path / "short.wav", engine, speech=0)
    assert heard.duration_s == samples / 16_000
    assert heard.text == "" or samples >= 1040
