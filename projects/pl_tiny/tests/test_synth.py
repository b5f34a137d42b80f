import numpy as np
import pytest
import soundfile

from mowa.data.manifests.examples import read_examples
from mowa.data.text.normalize import normalize_text
from mowa.errors import DataError
from projects.pl_tiny import synth

LINES = [f"Zdanie {word} jest już gotowe." for word in ("pierwsze", "drugie", "trzecie", "czwarte", "piąte")]


def test_plan_goes_through_all_lines_in_each_epoch():
    chosen = synth.plan_utterances(LINES, ["pl+f1", "pl+m1"], count=12, seed=3, prefix="x")
    assert sorted(u.text for u in chosen[:5]) == sorted(LINES)
    assert chosen == synth.plan_utterances(LINES, ["pl+f1", "pl+m1"], count=12, seed=3, prefix="x")
    assert len({u.id for u in chosen}) == 12


def test_manifest_is_written_and_read_back(tmp_path):
    chosen = synth.plan_utterances(LINES, synth.list_voices()[:3], count=6, seed=0, prefix="clip")
    hours = synth.synthesize_manifest(chosen, tmp_path / "train.jsonl", processes=1)
    examples = list(read_examples(tmp_path / "train.jsonl"))
    assert [e.text for e in examples] == [normalize_text(u.text) for u in chosen]
    assert sum(e.duration_s for e in examples) / 3600 == pytest.approx(hours)
    for example in examples:
        samples, rate_hz = soundfile.read(example.audio)
        assert rate_hz == 16_000
        assert len(samples) / rate_hz == pytest.approx(example.duration_s, abs=1e-3)
        assert 0.02 < np.abs(samples).max() <= 1
    assert not list(tmp_path.rglob("*.part*"))


def test_an_interrupted_corpus_is_resumed(tmp_path):
    chosen = synth.plan_utterances(LINES, synth.list_voices()[:3], count=4, seed=0, prefix="clip")
    synth.synthesize_manifest(chosen, tmp_path / "train.jsonl", processes=1)
    manifest = (tmp_path / "train.jsonl").read_text()
    kept, lost = sorted(tmp_path.rglob("*.wav"))[:2]
    lost.unlink()
    (tmp_path / "train.jsonl").unlink()
    before = kept.stat().st_mtime_ns
    synth.synthesize_manifest(chosen, tmp_path / "train.jsonl", processes=1)
    assert (tmp_path / "train.jsonl").read_text() == manifest
    assert kept.stat().st_mtime_ns == before
    assert lost.exists()


def test_other_sentences_replace_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "DEV_CLIPS", 5)
    monkeypatch.setattr(synth, "TEST_CLIPS", 10)
    numerals = "jeden dwa trzy cztery pięć sześć siedem osiem dziewięć dziesięć".split()
    for animal in ("Źrebię", "Jagnię"):
        lines = [f"{animal} {a} {b} {c}." for a in numerals for b in numerals for c in numerals]
        synth.build_corpus(lines, tmp_path, clips=3, processes=1)
        training = {normalize_text(line) for line in (tmp_path / "sentences.txt").read_text().splitlines()}
        texts = [example.text for example in read_examples(tmp_path / "train.jsonl")]
        assert len(texts) == 3
        assert set(texts) <= training
        assert not training & {example.text for example in read_examples(tmp_path / "unseen.jsonl")}


def test_too_few_sentences_are_refused(tmp_path):
    with pytest.raises(DataError, match="too few sentences"):
        synth.build_corpus(LINES, tmp_path, clips=5)


def test_unknown_voice():
    with pytest.raises(DataError, match="no voice"):
        synth.EspeakEngine().synthesize(synth.Utterance("a", "Cześć.", "pl+nobody", 150, 50, 50))
