"""The same job on a Ray cluster: the lines of one process, also where a worker is killed in the midst of it."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import soundfile

import mowa
from mowa.data import audio
from mowa.engines import batch, ray_data
from mowa.engines.batch import CorpusSource
from mowa.engines.results import ResultsFile
from mowa.engines.settings import EngineSpec, TranscriptionSettings, WorkerPool
from mowa.engines.transcription import load_engine
from mowa.errors import DataError, ModelError

SAMPLE = Path(mowa.__file__).parent / "assets" / "sample.flac"
WANTED = EngineSpec("pl-tiny", dtype="float32", device="cpu", threads=1)
SETTINGS = TranscriptionSettings(batch_s=4.0)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    sample, rng = audio.load_audio(SAMPLE), random.Random(0)
    for number in range(120):
        start, length = rng.randrange(len(sample) - 48_000), rng.randrange(16_000, 48_000)
        soundfile.write(folder / f"clip-{number:03}.wav", sample[start : start + length], 16_000)
    (folder / "clip-999.mp3").write_bytes(b"ID3 nothing of the kind")
    return folder


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    journal = tmp_path_factory.mktemp("alone") / "j.jsonl"
    engine = load_engine(WANTED).engine
    with ResultsFile.open(journal, batch.build_header(engine, SETTINGS)) as book:
        batch.transcribe_corpus(CorpusSource((str(clips),)).examples(), engine, SETTINGS, book)
    return texts(journal)


@pytest.fixture(scope="module")
def ray():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def texts(journal):
    rows = [json.loads(line) for line in journal.read_text().splitlines()][1:]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: (row.get("text"), row.get("error")) for row in rows}


def spread(clips, path, **how):
    with ResultsFile.open(path, batch.build_header(load_engine(WANTED).engine, SETTINGS)) as book:
        ray_data.transcribe_on_ray(CorpusSource((str(clips),)), WANTED, SETTINGS, book, workers=WorkerPool(2, 2), **how)


def test_two_workers_say_what_one_process_says(ray, clips, alone, tmp_path):
    heard = []
    spread(clips, tmp_path / "j.jsonl", heard=heard.append)
    assert texts(tmp_path / "j.jsonl") == alone
    assert len(heard) == 121
    spread(clips, tmp_path / "j.jsonl", heard=heard.append)
    assert len(heard) == 121  # nothing was left to do


def test_a_worker_killed_in_the_midst_loses_nothing(ray, clips, alone, tmp_path):
    path, killed = tmp_path / "j.jsonl", []

    def kill():
        while not (path.exists() and path.read_bytes().count(b"\n") > 2):
            time.sleep(0.05)
        hearers = [p for p in psutil.process_iter(["cmdline"]) if "Hearer" in " ".join(p.info["cmdline"] or ())]
        hearers = hearers or [
            p for p in psutil.process_iter(["cmdline"]) if "_MapWorker" in " ".join(p.info["cmdline"] or ())
        ]
        hearers[0].send_signal(signal.SIGKILL)
        killed.append(hearers[0].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    spread(clips, path)
    thread.join()
    assert killed
    assert texts(path) == alone


def test_what_is_wrong_there_is_said_here(ray, clips, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"audio": ')
    with pytest.raises(DataError, match="broken JSON"):
        spread(tmp_path / "broken.jsonl", tmp_path / "j.jsonl")
    with (
        pytest.raises(ModelError, match="a worker wants 64"),
        ResultsFile.open(tmp_path / "k.jsonl", batch.build_header(load_engine(WANTED).engine, SETTINGS)) as book,
    ):
        ray_data.transcribe_on_ray(
            CorpusSource((str(clips),)), WANTED, SETTINGS, book, workers=WorkerPool(1, 1, num_cpus=64)
        )
