"""A file's transcript does not depend on its batch or on the order of files."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mowa
from mowa.data import audio
from tests.checkpoints import KINDS, clip, tiny

ASSETS = Path(__file__).parents[1] / "assets"
SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"
MICRO = ("micro", "trained")
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    speech = audio.load_audio(SAMPLE)
    sounds = [clip(index, length) for index, length in enumerate([400, 6_000, 6_000])]
    sounds += [
        speech[at : at + length] for at, length in ((0, 16_000), (40_000, 23_457), (90_000, 48_000), (0, 80_000))
    ]
    for index, sound in enumerate(sounds):
        soundfile.write(folder / f"{index}.wav", sound, 16_000, subtype="FLOAT")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", params=[(*kind, dtype) for kind in [*KINDS, MICRO] for dtype in DTYPES], ids="-".join)
def engine(request, tmp_path_factory):
    family, norm, dtype = request.param
    trained = (family, norm) == MICRO
    folder = ASSETS / "micro" if trained else tiny(tmp_path_factory.mktemp("model"), family, norm)
    return mowa.open_engine(mowa.load(str(folder)), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def alone(engine, files):
    """Transcripts of single files, split into windows if longer than two seconds."""
    return {str(file): mowa.transcribe(file, engine, window_s=2.0, context_s=0.5, vad_threshold=0.0) for file in files}


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(7)), count=st.integers(1, 7), batch_s=st.sampled_from([1.0, 4.0, 32.0]))
def test_batches_and_order_do_not_matter(engine, files, alone, order, count, batch_s):
    chosen = [files[index] for index in order[:count]]
    together = list(mowa.transcribe(chosen, engine, window_s=2.0, context_s=0.5, vad_threshold=0.0, batch_s=batch_s))
    assert [outcome.file for outcome in together] == [str(file) for file in chosen]
    for outcome in together:
        expected = alone[outcome.file]
        assert outcome.text == expected.text
        assert [(w.text, w.start_s, w.end_s) for w in outcome.words] == [
            (w.text, w.start_s, w.end_s) for w in expected.words
        ]
        np.testing.assert_allclose(
            [w.confidence for w in outcome.words], [w.confidence for w in expected.words], atol=1e-4
        )


def test_times_are_monotone_and_within_the_recording(alone):
    assert any(transcript.words for transcript in alone.values())
    for transcript in alone.values():
        times = [(c.start_s, c.end_s) for word in transcript.words for c in word.characters]
        assert all(0 <= start <= end <= transcript.duration_s for start, end in times)
        assert all(before[1] <= after[0] for before, after in pairwise(times))
        assert all(0 < word.confidence <= 1 for word in transcript.words)
        assert transcript.text == " ".join(word.text for word in transcript.words)
