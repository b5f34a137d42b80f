"""`mowa quantize`, `mowa export` and `mowa bench` on a small net."""

import json
import os
from pathlib import Path

import pytest
import soundfile

from mowa.cli.main import main
from mowa.data import audio
from mowa.io.hub import SAMPLE_CLIP
from tests.tiny_causal import tiny_causal

ROOT = Path(__file__).parents[2]
MICRO = str(ROOT / "tests" / "assets" / "micro")
TEXT = "dzień dobry nazywam się ania i mieszkam w małym domu nad rzeką"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(one) for one in arguments])
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two recordings with transcripts."""
    folder = tmp_path_factory.mktemp("data")
    sound = audio.load_audio(ROOT / "examples" / "dzien-dobry.flac")
    rows = []
    for index in range(2):
        soundfile.write(folder / f"{index}.wav", sound[index * 32_000 : index * 32_000 + 48_000], 16_000)
        rows.append({"id": str(index), "audio": f"{index}.wav", "text": TEXT, "duration_s": 3.0})
    (folder / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "dev.jsonl"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("MOWA_CACHE")
    os.environ["MOWA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("MOWA_CACHE") if before is None else os.environ.update(MOWA_CACHE=before)


def test_a_report_is_built_and_resumed(run, data, tmp_path, monkeypatch):
    command = ["quantize", MICRO, "--scheme", "int8", "--to", "onnx", "--data", data, "--out", tmp_path / "out"]
    code, out, _ = run(*command)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines if "onnx " in line] == [["float32", "onnx"], ["int8-dynamic", "onnx"]]
    assert "words, at least 200 are needed" in out
    kept = json.loads((tmp_path / "out" / "quant_report.json").read_text())
    assert [row["verdict"] for row in kept["rows"]] == ["inconclusive"] * 2
    assert kept["rows"][1]["size_ratio"] < 0.6
    assert (tmp_path / "out" / "quant_report.html").read_text().startswith("<!doctype html>")

    from mowa.evaluation import report

    monkeypatch.setattr(report, "measure", lambda request: pytest.fail("measured again"))
    monkeypatch.setattr(report, "export", lambda *_: pytest.fail("exported again"))
    assert run(*command)[1] == out


def test_an_export_is_run_by_its_path(run, tmp_path):
    code, out, _ = run("export", MICRO, "--to", "onnx", "--scheme", "int8", "--out", tmp_path / "out")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'out'}  ")
    sample = ROOT / "examples" / "dzien-dobry.flac"
    code, theirs, _ = run("transcribe", "-m", tmp_path / "out", sample)
    assert code == 0
    assert theirs.strip()
    code, _, err = run("transcribe", "-m", tmp_path / "out", "--engine", "pytorch", sample)
    assert code == 2
    assert err.startswith(f"mowa: {tmp_path / 'out'} is an export to onnx and cannot run with --engine pytorch: ")
    assert err.count("\n") == 1
    code, _, err = run("transcribe", "-m", tmp_path / "out", "--adapter", tmp_path, sample)
    assert code == 2
    assert "takes no adapter" in err
    code, out, _ = run("bench", MICRO, tmp_path / "out", "--plot", tmp_path / "p.png", "--out", tmp_path / "b.json")
    assert code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["version"] == 2
    rows = written["results"]
    assert [row["engine"] for row in rows] == ["pytorch", "onnx"]
    assert all(row["rtf"] > 0 and row["peak_memory_bytes"] > 10**8 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", MICRO, "--to", "onyx", "-o", "x"], "unknown format 'onyx': did you mean onnx?"),
        (["export", MICRO, "--to", "onnx", "--scheme", "int5", "-o", "x"], "unknown scheme 'int5'; did you mean"),
        (["export", MICRO, "--to", "onnx", "--lengths-s", "5", "-o", "x"], "--lengths-s is an option of coreml"),
        (
            ["export", MICRO, "--to", "onnx", "--scheme", "int8-static", "-o", "x"],
            "int8-static needs calibration recordings",
        ),
        (["export", MICRO, "--to", "tensorrt", "--optimization-profile", "5", "-o", "x"], "expected three shapes"),
        (["quantize", MICRO, "--scheme", "int8", "--to", "coreml", "--data", "."], "coreml cannot be run by mowa"),
        (["quantize", MICRO, "--scheme", "int8", "--data", "/nowhere"], "/nowhere"),
        (
            ["quantize", MICRO, "--scheme", "int8-static", "--data", str(SAMPLE_CLIP)],
            "int8-static needs calibration recordings, and",
        ),
        (["bench", "/nowhere"], "none of the models could be run"),
    ],
)
def test_errors_are_one_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_language_model_is_exported(run, tmp_path):
    base = tiny_causal(tmp_path / "base")
    code, out, _ = run("export", base, "--to", "safetensors", "--scheme", "int8", "-o", tmp_path / "out")
    assert (code, "safetensors, int8-weight" in out) == (0, True)
    code, _, err = run("export", base, "--to", "onnx", "-o", tmp_path / "onnx")
    assert code == 2
    assert "is a language model and cannot be exported to onnx" in err
    code, _, err = run("transcribe", "-m", tmp_path / "out", SAMPLE_CLIP)
    assert code == 2
    assert "is not a speech model (llama)" in err
