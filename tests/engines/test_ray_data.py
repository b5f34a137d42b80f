"""Transcription on Ray gives the records of one process, also when a worker is killed."""

import json
import os
import random
import signal
import threading
import time

import psutil
import pytest
import soundfile

from mowa.data import audio
from mowa.engines import batch, ray_data
from mowa.engines.batch import CorpusSource
from mowa.engines.results import ResultsFile
from mowa.engines.settings import EngineSpec, TranscriptionSettings, WorkerPool
from mowa.engines.transcription import load_engine
from mowa.errors import DataError, ModelError
from mowa.io.hub import SAMPLE_CLIP as SAMPLE

SPEC = EngineSpec("pl-tiny", dtype="float32", device="cpu", threads=1)
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
def single_process(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "j.jsonl"
    engine = load_engine(SPEC).engine
    with ResultsFile.open(path, batch.build_header(engine, SETTINGS)) as results:
        batch.transcribe_corpus(CorpusSource((str(clips),)).examples(), engine, SETTINGS, results)
    return texts(path)


@pytest.fixture(scope="module")
def ray():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def texts(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: (row.get("text"), row.get("error")) for row in rows}


def spread(clips, path, **options):
    with ResultsFile.open(path, batch.build_header(load_engine(SPEC).engine, SETTINGS)) as results:
        ray_data.transcribe_on_ray(
            CorpusSource((str(clips),)), SPEC, SETTINGS, results, workers=WorkerPool(2, 2), **options
        )


def test_two_workers_give_the_records_of_one_process(ray, clips, single_process, tmp_path):
    seconds = []
    spread(clips, tmp_path / "j.jsonl", on_progress=seconds.append)
    assert texts(tmp_path / "j.jsonl") == single_process
    assert len(seconds) == 121
    spread(clips, tmp_path / "j.jsonl", on_progress=seconds.append)
    assert len(seconds) == 121  # nothing was left to do


def test_a_killed_worker_loses_nothing(ray, clips, single_process, tmp_path):
    path, killed = tmp_path / "j.jsonl", []

    def kill():
        while not (path.exists() and path.read_bytes().count(b"\n") > 2):
            time.sleep(0.05)
        workers = [
            p for p in psutil.process_iter(["cmdline"]) if "TranscriptionWorker" in " ".join(p.info["cmdline"] or ())
        ]
        workers = workers or [
            p for p in psutil.process_iter(["cmdline"]) if "_MapWorker" in " ".join(p.info["cmdline"] or ())
        ]
        workers[0].send_signal(signal.SIGKILL)
        killed.append(workers[0].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    spread(clips, path)
    thread.join()
    assert killed
    assert texts(path) == single_process


def test_errors_of_workers_are_raised_here(ray, clips, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"audio": ')
    with pytest.raises(DataError, match="broken JSON"):
        spread(tmp_path / "broken.jsonl", tmp_path / "j.jsonl")
    with (
        pytest.raises(ModelError, match="one worker needs 64"),
        ResultsFile.open(tmp_path / "k.jsonl", batch.build_header(load_engine(SPEC).engine, SETTINGS)) as results,
    ):
        ray_data.transcribe_on_ray(
            CorpusSource((str(clips),)), SPEC, SETTINGS, results, workers=WorkerPool(1, 1, num_cpus=64)
        )
