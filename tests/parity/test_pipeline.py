"""`transformers.pipeline` and mowa transcribe with the bundled model alike: same text and word times."""

import warnings

import pytest
from transformers import pipeline

import mowa
from mowa.data import audio
from mowa.data.manifests.examples import read_examples
from mowa.io.hub import MODEL_ALIASES
from projects.pl_tiny import synth

SENTENCES = [
    "W starym domu nad rzeką mieszkał samotny zegarmistrz.",
    "Czy możesz mi powiedzieć, która jest godzina?",
    "Jutro rano pójdziemy na targ po świeże jabłka i śliwki.",
    "Nie wiem, co się stało, ale wszyscy byli zdziwieni.",
    "Zażółć gęślą jaźń!",
    "Deszcz padał przez całą noc i ulice były mokre.",
]


@pytest.fixture(scope="module")
def pipe():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline("automatic-speech-recognition", model=str(MODEL_ALIASES["pl-tiny"]), dtype="float32")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoken")
    chosen = synth.plan_utterances(SENTENCES, synth.list_voices()[::5], count=8, seed=11, prefix="said")
    synth.synthesize_manifest(chosen, folder / "speech.jsonl", processes=1)
    return list(read_examples(folder / "speech.jsonl"))


def test_same_text(pipe, examples):
    engine = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32")
    ours = mowa.transcribe([example.audio for example in examples], engine)
    theirs = [" ".join(pipe(audio.load_audio(example.audio))["text"].split()) for example in examples]
    assert [transcript.text for transcript in ours] == theirs
    assert all(theirs)


def test_same_word_times(pipe, examples):
    transcript = mowa.transcribe(examples[0].audio, dtype="float32", device="cpu")
    theirs = pipe(audio.load_audio(examples[0].audio), return_timestamps="word")["chunks"]
    assert [word.text for word in transcript.words] == [chunk["text"] for chunk in theirs]
    for word, chunk in zip(transcript.words, theirs, strict=True):
        assert (word.start_s, word.end_s) == pytest.approx(chunk["timestamp"], abs=0.0051)  # they round to 10 ms
