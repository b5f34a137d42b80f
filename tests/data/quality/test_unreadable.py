"""One bad recording does not end what reads many: it is left out, with a warning that names it."""

import json

import numpy as np
import pytest
import soundfile

from mowa import loading
from mowa.cli.main import main
from mowa.data.quality import unreadable
from mowa.errors import DataError
from mowa.quantization import calibration
from mowa.types import Example
from tests.checkpoints import clip, tiny


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        soundfile.write(tmp_path / f"{index}.wav", clip(index, 16_000), 16_000)
    samples = clip(9, 16_000)
    samples[400] = np.inf
    soundfile.write(tmp_path / "1.wav", samples, 16_000, subtype="FLOAT")
    (tmp_path / "2.wav").write_bytes(b"")
    (tmp_path / "3.wav").unlink()
    rows = [{"id": str(index), "audio": f"{index}.wav", "text": f"tekst {index}"} for index in range(6)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:4]))
    return tmp_path


def test_measured_recordings_are_those_that_can_be_read(folder, caplog):
    examples = unreadable.read_measurable(str(folder / "all.jsonl"))
    assert [example.id for example in examples] == ["0", "1", "4", "5"]
    assert "cannot be read: 2 of 6 recordings" in caplog.text
    assert "2.wav: is empty" in caplog.text
    assert "no recording 3.wav" in caplog.text
    assert [example.id for example in unreadable.drop_unreadable(examples)] == ["0", "4", "5"]
    assert "1.wav: holds a sample that is not a number" in caplog.text
    assert "cannot be read: 1 of 4 recordings" in caplog.text


def test_nothing_left_is_an_error_with_the_reasons(folder):
    with pytest.raises(
        DataError, match=r"2 of 2 recordings cannot be read, and none is left. Repair them.\n(.|\n)*2.wav: is empty"
    ):
        unreadable.read_measurable(str(folder / "bad.jsonl"))


def test_calibration_goes_on_without_a_bad_recording(folder, tmp_path_factory, caplog):
    model = loading.load(str(tiny(tmp_path_factory.mktemp("base"))))
    assert len(calibration.load_clips(str(folder / "all.jsonl"), model)) == 3
    assert "not used for calibration" in caplog.text
    with pytest.raises(DataError, match="no recording can be read"):
        calibration.sample_clips([Example("1", str(folder / "1.wav"), "", 1.0)], model)


def test_an_excerpt_is_decoded_as_one(folder):
    whole = Example("1", str(folder / "1.wav"), "", 0.5)
    after = Example("1", str(folder / "1.wav"), "", 0.5, offset_s=0.5, is_excerpt=True)
    beyond = Example("0", str(folder / "0.wav"), "", 0.5, offset_s=0.9, is_excerpt=True)
    found = unreadable.find_unreadable([whole, after, beyond], 16_000)
    assert set(found) == {unreadable.recording_key(whole), unreadable.recording_key(beyond)}


def test_data_split_leaves_bad_recordings_out_and_says_so(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["data", "split", str(folder / "all.jsonl"), "-o", str(folder / "out"), "--dev", "1", "--test", "1"])
    assert end.value.code == 0
    assert "cannot be read: 2 of 6 recordings" in capsys.readouterr().out
    assert sum(len(file.read_text().splitlines()) for file in (folder / "out").glob("*.jsonl")) == 4
