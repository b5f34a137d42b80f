"""`mowa transcribe`: good files, bad files, and what is printed where."""

import json

import numpy as np
import pytest
import soundfile

from mowa.cli.main import main
from mowa.decode import captions
from tests.checkpoints import clip, tiny
from tests.unprivileged import unprivileged

ALL = ["--vad-threshold", "0", "--dtype", "float32"]  # the clips are noise


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def run(capsys, model):
    def call(*arguments, use=model):
        with pytest.raises(SystemExit) as end:
            main(["transcribe", *map(str, arguments), *ALL, "--model", use])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.wav"
    soundfile.write(path, clip(0, 20_000), 16_000)
    return path


def wav(path, samples, rate_hz=16_000, **options):
    soundfile.write(path, samples, rate_hz, **options)
    return path


def bad_files(folder):
    """Write bad files into one folder; return name → a word of its error message."""
    folder.mkdir()
    (folder / "empty.wav").touch()
    wav(folder / "none.wav", np.zeros(0))
    wav(folder / "short.wav", np.zeros(399))
    (folder / "notes.mp3").write_text("this is a shopping list, not a recording " * 50)
    whole = wav(folder / "whole.ogg", clip(1, 160_000)).read_bytes()
    (folder / "whole.ogg").unlink()
    (folder / "cut.ogg").write_bytes(whole[: len(whole) // 2])
    header = bytearray(wav(folder / "zero.wav", clip(1, 8000)).read_bytes())
    header[24:28] = bytes(4)
    (folder / "zero.wav").write_bytes(header)
    broken = clip(1, 8000)
    broken[4000] = np.nan
    wav(folder / "nan.wav", broken, subtype="FLOAT")
    return {
        "empty.wav": "empty", "none.wav": "no", "short.wav": "short", "notes.mp3": "audio", "cut.ogg": "cut off",
        "zero.wav": "0 Hz", "nan.wav": "not a number",
    }  # fmt: skip


def test_bad_files_are_reported_and_the_good_one_is_transcribed(run, good, tmp_path):
    bad = bad_files(tmp_path / "bad")
    code, out, err = run(tmp_path / "bad", good, "--format", "json")
    assert code == 2
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(good)]
    lines = err.strip().splitlines()
    assert len(lines) == len(bad)
    for name, word in bad.items():
        (line,) = [line for line in lines if name in line]
        assert line.startswith("mowa: ")
        assert word in line


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("silence.wav", np.zeros(32_000)),
        ("eight.wav", np.stack([clip(i, 32_000) for i in range(8)], 1)),
        ("onebit.wav", np.sign(clip(3, 32_000))),
        ("tone.flac", np.sin(np.arange(32_000) * 0.17) * 0.5),
    ],
)
def test_odd_but_good(run, tmp_path, name, samples):
    code, out, err = run(wav(tmp_path / name, samples), "--format", "json")
    assert (code, err) == (0, "")
    transcript = captions.parse_json(out)
    assert transcript.duration_s == pytest.approx(2.0)
    if name == "silence.wav":
        assert transcript.text == ""


def test_windows_without_speech_are_skipped(capsys, model, tmp_path):
    noise = wav(tmp_path / "noise.wav", np.random.default_rng(0).standard_normal(48_000) * 0.01)
    with pytest.raises(SystemExit):
        main(["transcribe", str(noise), "--model", model, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["text"] == ""


def test_unreadable(run, good):
    good.chmod(0)
    with unprivileged():
        code, _, err = run(good)
    assert code == 2
    assert "permission" in err.lower()


def test_missing_file_and_empty_folder(run, good, tmp_path):
    (tmp_path / "nothing").mkdir()
    code, out, err = run("lost.wav", tmp_path / "nothing", good)
    assert code == 2
    assert out.strip()
    assert [line.split(":")[1].strip() for line in err.strip().splitlines()] == ["lost.wav", str(tmp_path / "nothing")]


def test_unknown_alias_offers_the_nearest(run, good):
    code, out, err = run(good, use="pl-tinny")
    assert (code, out) == (2, "")
    assert "pl-tiny" in err
    assert len(err.splitlines()) == 1


def test_folder_with_out(run, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for place in ("a.wav", "a.flac", "deep/b.wav"):
        wav(tmp_path / "in" / place, clip(len(place), 8_000))
    code, out, err = run(tmp_path / "in", "--out", tmp_path / "out", "--format", "srt")
    assert (code, out, err) == (0, "", "")
    written = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert written == ["a.srt", "a.wav.srt", "deep/b.srt"]


@pytest.mark.parametrize("form", captions.FORMAT_SUFFIXES)
def test_every_format(run, good, form):
    code, out, err = run(good, "--format", form)
    assert (code, err) == (0, "")
    assert out.endswith("\n")


def test_json_and_python_agree(run, good, model):
    import mowa

    _, out, _ = run(good, "--format", "json", "--char-times")
    ours = mowa.transcribe(good, model, dtype="float32", vad_threshold=0.0)
    assert captions.parse_json(out).text == ours.text
    assert json.loads(out) == json.loads(captions.render(ours, "json", char_times=True))


def test_several_texts_have_file_names(run, good, tmp_path):
    other = wav(tmp_path / "other.wav", clip(5, 30_000))
    _, out, _ = run(good, other)
    assert [line.partition(":")[0] for line in out.splitlines()] == [str(good), str(other)]
