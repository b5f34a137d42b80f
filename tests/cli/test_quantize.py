"""`mowa shrink`, `mowa export` and `mowa bench` as people meet them, on a real net that is small."""

import json
import os
from pathlib import Path

import pytest
import soundfile

from mowa.cli.main import main
from mowa.data import audio
from mowa.exporters import verify

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
    """Two recordings with texts."""
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


def test_a_card_is_made_and_gone_on_with(run, data, tmp_path, monkeypatch):
    said = ["shrink", MICRO, "--scheme", "int8", "--to", "onnx", "--data", data, "--out", tmp_path / "out"]
    code, out, _ = run(*said)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines if "onnx " in line] == [["float32", "onnx"], ["int8-dynamic", "onnx"]]
    assert "words are too few to tell" in out
    kept = json.loads((tmp_path / "out" / "card.json").read_text())
    assert [row["verdict"] for row in kept["rows"]] == ["doubtful"] * 2
    assert kept["rows"][1]["share"] < 0.6
    assert (tmp_path / "out" / "card.html").read_text().startswith("<!doctype html>")

    from mowa.evaluation import report

    monkeypatch.setattr(report, "measure", lambda request: pytest.fail("it was measured again"))
    monkeypatch.setattr(report, "export", lambda *_: pytest.fail("it was exported again"))
    assert run(*said)[1] == out


def test_what_is_exported_is_run_by_its_path(run, tmp_path):
    code, out, _ = run("export", MICRO, "--to", "onnx", "--scheme", "int8", "--out", tmp_path / "out")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'out'}  ")
    sample = ROOT / "examples" / "dzien-dobry.flac"
    code, theirs, _ = run("transcribe", "-m", tmp_path / "out", sample)
    assert code == 0
    assert theirs.strip()
    code, _, err = run("transcribe", "-m", tmp_path / "out", "--engine", "pytorch", sample)
    assert (code, err) == (2, f"mowa: {tmp_path / 'out'} was exported as onnx: leave --engine out, or name the model"
                              " it was made of\n")  # fmt: skip
    code, _, err = run("transcribe", "-m", tmp_path / "out", "--adapter", tmp_path, sample)
    assert code == 2
    assert "takes no adapter" in err
    code, out, _ = run("bench", MICRO, tmp_path / "out", "--picture", tmp_path / "p.png", "--json", tmp_path / "b.json")
    assert code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["engine"] for row in rows] == ["pytorch", "onnx"]
    assert all(row["rtf"] > 0 and row["memory"] > 10**8 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", MICRO, "--to", "onyx", "-o", "x"], "no format is called 'onyx'; did you mean onnx?"),
        (["export", MICRO, "--to", "onnx", "--scheme", "int5", "-o", "x"], "no scheme is called 'int5'; did you mean"),
        (["export", MICRO, "--to", "onnx", "--seconds", "5", "-o", "x"], "--seconds is for coreml, not for onnx"),
        (["export", MICRO, "--to", "onnx", "--scheme", "int8-static", "-o", "x"], "int8-static needs recordings"),
        (["export", MICRO, "--to", "tensorrt", "--profile", "5", "-o", "x"], "--profile 5 is not three sizes"),
        (["shrink", MICRO, "--scheme", "int8", "--to", "coreml", "--data", "."], "coreml does not run here"),
        (["shrink", MICRO, "--scheme", "int8", "--data", "/nowhere"], "/nowhere"),
        (
            ["shrink", MICRO, "--scheme", "int8-static", "--data", str(verify.SAMPLE)],
            "int8-static is calibrated on the one recording of",
        ),
        (["bench", "/nowhere"], "none of them could be run"),
    ],
)
def test_bad_input_is_one_line(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
