"""File names that are not UTF-8, such as those of old archives: every verb reads them and every output names them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from mowa import loading
from mowa.cli.main import main
from mowa.decode import captions
from mowa.engines import ray_data
from mowa.quantization import calibration
from mowa.training.config import ctc
from mowa.training.ctc import batches, setup
from tests.checkpoints import clip, tiny

NAME = os.fsdecode(b"z\xf1.wav")  # ñ in Latin-1
OPTIONS = ["--vad-threshold", "0", "--dtype", "float32"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("model"), conv_dim=(8,) * 7, intermediate_size=32))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a recording, one with such a name in each decoder, and an empty one."""
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "sounds"
    folder.mkdir()
    soundfile.write(folder / "a.wav", clip(0, 20_000), 16_000)
    (folder / NAME).write_bytes((folder / "a.wav").read_bytes())
    soundfile.write(folder / "b.mp3", clip(0, 20_000), 16_000, format="MP3")
    (folder / "b.mp3").rename(folder / NAME.replace("wav", "mp3"))
    (folder / os.fsdecode(b"e\xf1.wav")).touch()
    return folder


@pytest.fixture
def run(capfdbinary):
    """Call mowa and return exit code, output and errors as bytes."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(one) for one in arguments])
        return end.value.code, *capfdbinary.readouterr()

    return call


def transcribe(run, folder, model, *arguments):
    return run("transcribe", folder, "-m", model, *OPTIONS, *arguments)


def test_text_on_standard_output_has_the_bytes_of_the_name(folder, model):
    """In a process of its own, where standard output is strict UTF-8."""
    command = [sys.executable, "-m", "mowa", "transcribe", str(folder), "-m", model, *OPTIONS]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    names = [line.split(b": ")[0] for line in done.stdout.splitlines()]
    assert names == [os.fsencode(folder / name) for name in ("a.wav", NAME.replace("wav", "mp3"), NAME)]
    assert b"is empty (0 bytes)" in done.stderr
    assert b"Traceback" not in done.stderr


def test_json_is_valid_utf8_and_gives_the_name_back(run, folder, model):
    code, out, _ = transcribe(run, folder, model, "--format", "json")
    assert code == 2
    rows = [json.loads(line) for line in out.decode().splitlines()]
    assert [row["file"] for row in rows] == [str(folder / name) for name in ("a.wav", NAME.replace("wav", "mp3"), NAME)]
    assert all(captions.parse_json(line).file for line in out.decode().splitlines())
    assert "ó" in rows[0]["text"]
    assert "ó".encode() in out  # other characters are not escaped


@pytest.mark.parametrize("format_name", list(captions.FORMAT_SUFFIXES))
def test_every_format_is_written_under_the_name(run, folder, model, tmp_path, format_name):
    code, _, _ = transcribe(run, folder, model, "--format", format_name, "--out", tmp_path / "out")
    suffix = captions.FORMAT_SUFFIXES[format_name]
    assert code == 2
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"a{suffix}",
        NAME.replace(".wav", suffix),
        f"{NAME}{suffix}",
    }


def test_a_batch_job_ends_resumes_and_converts(run, folder, model, tmp_path):
    log = tmp_path / "log.jsonl"
    for _ in range(2):
        code, _, err = transcribe(run, folder, model, "--results", log)
        assert code == 2
        assert b"4 recordings, 1 failed" in err
    assert b"resuming, 4 recordings" in err
    _, *records = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert len(records) == 4
    assert {Path(record["file"]).name for record in records} == {file.name for file in folder.iterdir()}
    code, out, _ = run("results", "show", log)
    assert code == 0
    assert "1 × is empty (0 bytes)".encode() in out
    assert run("results", "merge", log, "-o", tmp_path / "merged.jsonl")[0] == 0
    assert run("results", "export", log, "-o", tmp_path / "texts")[0] == 0
    assert NAME.replace(".wav", ".txt") in {file.name for file in (tmp_path / "texts").iterdir()}
    assert run("results", "export", log, "-f", "json")[0] == 0


def test_reports_and_splits_name_it(run, folder, tmp_path):
    code, out, _ = run("data", "check", folder, "--json")
    assert code == 2
    assert json.loads(out.decode())["splits"][str(folder)]["recordings"] == 4
    assert run("data", "check", folder)[0] == 2


def test_a_manifest_with_it_is_split_and_trained_on(run, folder, model, tmp_path):
    for index in range(4):
        soundfile.write(folder / f"{index}.wav", clip(index, 12_000), 16_000)
    names = [NAME, NAME.replace("wav", "mp3"), "a.wav", *(f"{index}.wav" for index in range(4))]
    rows = [{"audio": name, "text": f"a{'bcde'[index % 4]} o{'ab' * index}"} for index, name in enumerate(names)]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("data", "split", folder / "all.jsonl", "-o", tmp_path / "split", "--dev", "2", "--test", "0")[0] == 0
    written = [
        json.loads(line) for file in (tmp_path / "split").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    assert {Path(row["audio"]).name for row in written} == set(names)
    tree = {"model": model, "data": {"train": str(folder / "all.jsonl"), "dev": str(folder / "all.jsonl")}}
    recipe, loaded = ctc.parse(tree, "test"), loading.load(model)
    run_ = setup.prepare(recipe, loaded, setup.read_data(recipe, loaded, tmp_path / "run"))
    assert NAME in {Path(example.audio).name for batch in run_.batches for example in batch}
    dataset = batches.BatchDataset(run_.batches, setup.eval_batch_options(run_))
    assert sum(len(dataset[index]["lengths"]) for index in range(len(dataset))) == sum(map(len, run_.batches))
    assert calibration.load_clips(str(folder / "all.jsonl"), loaded)


def test_ray_workers_get_the_name(folder):
    pytest.importorskip("pyarrow")
    (example,) = [one for one in ray_data.batch.CorpusSource((str(folder),)).examples() if one.audio.endswith(NAME)]
    (row,) = ray_data._table([example]).to_pylist()
    assert ray_data._to_text(row["audio"]) == example.audio
    assert ray_data._to_text(row["id"]) == example.id


def test_a_report_of_schemes_has_ids_with_such_names(folder, model, tmp_path, run):
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": str(folder / NAME), "text": "ala ma"}))
    code, _, error = run(
        "quantize",
        model,
        "--scheme",
        "fp16",
        "--to",
        "safetensors",
        "--data",
        tmp_path / "m.jsonl",
        "-o",
        tmp_path / "q",
    )
    assert code in (0, 2), error
    assert b"Traceback" not in error
    assert (tmp_path / "q" / "quant_report.json").is_file()


def test_a_model_in_a_folder_with_such_a_name_is_one_clear_error(folder, model, tmp_path, run):
    shutil.copytree(model, tmp_path / "z\udcf1")
    code, _, error = transcribe(run, folder / "a.wav", tmp_path / "z\udcf1")
    assert code == 2
    assert b"read no folders whose names are not UTF-8: rename it" in error
    assert b"Traceback" not in error
