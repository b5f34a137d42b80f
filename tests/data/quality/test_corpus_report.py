import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import mowa
from mowa.cli import main
from mowa.data.manifests import examples
from mowa.data.quality import corpus_report
from mowa.data.quality.corpus_report import Issues
from mowa.types import Example

RATE_HZ = 16_000


def noise(seconds=1.0, seed=0, loud=0.1):
    values = np.random.default_rng(seed).normal(0, loud, int(seconds * RATE_HZ))
    return (np.round(values.clip(-0.9, 0.9) * 2**15) / 2**15).astype(np.float32)


def write_audio(path, samples, rate_hz=RATE_HZ, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz, **kwargs)
    return path


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main.main(["data", "check", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def ids(issues):
    return [id for id, _ in issues.examples]


@pytest.fixture
def corpus(tmp_path):
    """Write a manifest with one recording per issue, and 30 without."""
    rows = []
    for at in range(30):
        write_audio(tmp_path / f"good/{at}.wav", noise(2, at))
        rows.append(
            {"audio": f"good/{at}.wav", "text": f"zdanie {'aąbcćde'[at % 7] * 10} {at}", "speaker": f"s{at % 3}"}
        )
    write_audio(tmp_path / "again.flac", noise(2, 3))
    write_audio(tmp_path / "again24.wav", np.stack([noise(2, 4)] * 2, 1), subtype="PCM_24")
    write_audio(tmp_path / "slower.wav", noise(2, 5), 8_000)
    write_audio(tmp_path / "silent.wav", np.full(RATE_HZ, 0.25, np.float32))
    write_audio(tmp_path / "clipped.wav", (30 * noise(2, 90)).clip(-1, 1))
    write_audio(tmp_path / "fast.ogg", noise(2, 91))
    (tmp_path / "broken.mp3").write_bytes(b"no sound")
    rows += [
        {"audio": "again.flac", "text": "Zdanie, AAAAAAAAAA: 0!", "lang": "pl"},
        {"audio": "again24.wav", "text": "inne zdanie dwukanałowe"},
        {"audio": "slower.wav", "text": "zdanie nagrane wolniej od innych"},
        {"audio": "silent.wav", "text": " – "},
        {"audio": "clipped.wav", "text": "zdanie przesterowane"},
        {"audio": "fast.ogg", "text": "zbyt długie zdanie " * 100},
        {"audio": "broken.mp3", "text": "zdanie"},
        {"audio": "gone.wav", "text": "zdanie które zginęło"},
    ]
    return table(tmp_path / "m.jsonl", *rows)


def test_every_issue(corpus):
    seconds = []
    report = corpus_report.check_corpus(examples.list_examples(corpus), on_progress=seconds.append)
    assert report.recordings == 38
    assert (
        report.total_duration_s == pytest.approx(sum(seconds)) == pytest.approx(30 * 2 + 2 + 2 + 4 + 1 + 2 + 2, abs=0.1)
    )
    assert report.min_median_max_s == pytest.approx((1, 2, 4), abs=0.1)
    assert report.duration_histogram == {"up to 1 s": 1, "up to 2 s": 34, "up to 5 s": 1}
    assert (report.sample_rates_hz, report.channels) == ({16_000: 35, 8_000: 1}, {1: 35, 2: 1})
    assert report.formats == {"wav": 34, "flac": 1, "ogg": 1}
    assert report.languages == {"pl": 1}
    assert report.speakers == {"s0": 10, "s1": 10, "s2": 10}
    assert report.duplicate_audio == Issues(2, (("again", "3"), ("again24", "4")))
    assert report.duplicate_text == Issues(1, (("again", "0"),))
    assert ids(report.empty_text) == ids(report.silent) == ["silent"]
    assert ids(report.clipped) == ["clipped"]
    assert ids(report.chars_per_s_outliers) == ["fast"]
    assert report.unreadable.count == 2
    assert [detail.partition(": ")[2].partition(".")[0] for _, detail in report.unreadable.examples] == [
        "is not audio, or its index is cut off (Invalid data found when processing input)",
        "does not exist",
    ]
    assert (report.characters["ą"], report.characters["ę"], report.characters["ó"]) == (5 * 10, 1, 1)


def test_characters_are_counted(tmp_path):
    write_audio(tmp_path / "a.wav", noise())
    texts = ["Żółw, żółw!", "zo\u0301lw 7", "Łódź"]
    report = corpus_report.check_corpus(
        [Example(str(at), str(tmp_path / "a.wav"), text, 0) for at, text in enumerate(texts)]
    )
    assert report.characters == {"ó": 4, "ł": 3, "w": 3, "ż": 2, "l": 1, "z": 1, "d": 1, "ź": 1}
    assert report.rare_characters == ("z", "l", "d", "ź")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_duplicate_audio(tmp_path_factory, channels, seed):
    """Lossless containers and equal channels do not matter; one more sample or another rate does."""
    folder = tmp_path_factory.mktemp("same")
    samples = noise(0.2, seed)
    several = np.stack([samples] * channels, 1)
    write_audio(folder / "a.wav", samples)
    write_audio(folder / "b.flac", several)
    write_audio(folder / "c.wav", several, subtype="FLOAT")
    write_audio(folder / "d.aiff", samples, subtype="PCM_24")
    write_audio(folder / "e.wav", np.r_[samples, 0])
    write_audio(folder / "f.wav", samples, RATE_HZ // 2)
    changed = samples.copy()
    changed[7] += 2**-15
    write_audio(folder / "g.wav", changed)
    report = corpus_report.check_corpus(examples.list_examples(folder))
    assert report.duplicate_audio == Issues(3, (("b", "a"), ("c", "a"), ("d", "a")))


def test_excerpts_are_decoded_as_excerpts(tmp_path):
    write_audio(tmp_path / "a.wav", np.r_[noise(1, 1), noise(1, 2)])
    write_audio(tmp_path / "b.wav", noise(1, 2))
    rows = [{"audio": "a.wav", "offset": 0, "duration": 1}, {"audio": "a.wav", "offset": 1, "duration": 1}]
    report = corpus_report.check_corpus(examples.list_examples(table(tmp_path / "m.jsonl", *rows, {"audio": "b.wav"})))
    assert report.total_duration_s == 3
    assert report.duplicate_audio == Issues(1, (("b", "a-2"),))


def test_many_outliers_are_found(tmp_path):
    """With a third of wrong texts, no text would be an outlier by mean and standard deviation."""
    write_audio(tmp_path / "a.wav", noise(10, 1))
    texts = ["a" * 100] * 20 + ["b" * 120] * 20 + ["c" * 900] * 15 + ["d"] * 5
    report = corpus_report.check_corpus(
        [Example(str(at), str(tmp_path / "a.wav"), text, 0) for at, text in enumerate(texts)]
    )
    assert report.median_chars_per_s == pytest.approx(12)
    assert report.chars_per_s_outliers.count == 20
    assert set(ids(report.chars_per_s_outliers)) == {str(at) for at in range(40, 60)}
    assert report.chars_per_s_outliers.examples[0][1] == "0.1 characters/s"


def test_the_bundled_sample_has_no_issues(capsys):
    code, out, _ = run(capsys, Path(mowa.__file__).parent / "assets/sample.flac")
    assert code == 0
    assert "1 recordings, 0.2 min" in out
    assert "sample rates: 16000 Hz: 1" in out
    assert "silent: none\n  clipped: none\n  unreadable: none" in out


@pytest.fixture
def splits(tmp_path):
    folder = tmp_path / "cv"
    for split, at, who in (("train", 1, "x"), ("dev", 2, "y"), ("test", 3, "x"), ("validated", 1, "x")):
        write_audio(folder / f"clips/{split}.wav", noise(1, at))
        text = "Tak! Nie." if split in ("train", "dev") else split
        (folder / f"{split}.tsv").write_text(f"path\tsentence\tclient_id\n{split}.wav\t{text}\t{who}\n")
    return folder


def test_overlap_between_splits(splits, tmp_path, capsys):
    write_audio(splits / "clips/test.wav", noise(1, 1))
    code, out, _ = run(capsys, splits, "--json")
    report = json.loads(out)
    assert code == 0
    assert list(report["splits"]) == ["train", "dev", "test"]
    between = {tuple(pair["between"]): pair for pair in report["overlaps"]}
    none = {"count": 0, "examples": []}
    assert between["train", "dev"] == {
        "between": ["train", "dev"],
        "audio": none,
        "texts": {"count": 1, "examples": [["train", "dev"]]},
        "speakers": none,
    }
    assert between["train", "test"]["audio"] == {"count": 1, "examples": [["train", "test"]]}
    assert between["train", "test"]["speakers"] == {"count": 1, "examples": [["x", ""]]}
    code, out, _ = run(capsys, splits)
    assert "train and test\n  shared recordings: 1 (train = test)\n  shared texts: none\n" in out
    assert "not checked: validated (select one with --split)" in out
    _, out, _ = run(capsys, splits, "--split", "dev")
    assert out.startswith("dev\n  1 recordings")
    other = table(tmp_path / "other.jsonl", {"audio": str(splits / "clips/dev.wav"), "text": "x"})
    _, out, _ = run(capsys, splits, "--split", "dev", "--disjoint-from", other)
    assert f"dev and {other}\n  shared recordings: 1 (dev = dev)" in out


def test_a_source_that_fails(tmp_path, capsys):
    write_audio(tmp_path / "a.wav", noise())
    manifest = table(tmp_path / "m.jsonl", {"audio": "a.wav"})
    manifest.write_bytes(manifest.read_bytes() + b"\xff")
    code, out, _ = run(capsys, manifest)
    assert code == 2
    assert "1 recordings" in out
    assert f"unreadable: 1 ({manifest}:2: is not UTF-8" in out
    code, _, err = run(capsys, manifest, "--column", "audio")
    assert (code, err) == (2, "mowa: --column audio: expected ROLE=NAME, e.g. audio=path or id=clip_id\n")


def test_column_option(tmp_path, capsys):
    write_audio(tmp_path / "a.wav", noise())
    manifest = table(tmp_path / "m.jsonl", {"clip": "a.wav", "said": "tak"})
    assert run(capsys, manifest)[0] == 2
    code, out, _ = run(capsys, manifest, "--column", "audio=clip", "--column", "text=said")
    assert code == 0
    assert "characters: 3 distinct, 3 in total" in out
