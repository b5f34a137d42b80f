"""Peak memory does not grow with the length of a recording."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

MICRO = Path(__file__).parents[1] / "assets" / "micro"
CODE = """
import resource, sys, mowa
engine = mowa.open_engine(mowa.load(sys.argv[1]), device="cpu", dtype="float32")
mowa.transcribe(sys.argv[2], engine, vad_threshold=0.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_five_minutes(tmp_path):
    rng = np.random.default_rng(0)
    peaks = []
    for minutes in (5, 60):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
            for _ in range(minutes * 6):
                file.write(rng.standard_normal(160_000).astype(np.float32) * 0.1)
        done = subprocess.run([sys.executable, "-c", CODE, MICRO, path], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 100, f"peak MB: {peaks}"
