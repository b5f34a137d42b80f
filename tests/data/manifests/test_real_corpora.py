"""Real corpora, as they are distributed: a folder with transcripts.tsv, and WebDataset shards of Opus files."""

from itertools import islice

from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.data.manifests import discover
from mowa.data.manifests.examples import list_examples, read_examples
from tests.shared_data import shared_data


def test_a_folder_with_transcripts():
    folder = shared_data("human-pl")
    assert discover.detect_layout(folder).kind == "folder with transcripts"
    examples = list(read_examples(folder))
    assert len(examples) == len({example.id for example in examples}) == 179
    assert len({example.text for example in examples}) == 90
    assert {(example.tags["speaker"], example.tags["gender"]) for example in examples} == {
        ("EB0", "female"),
        ("WR0", "male"),
    }
    assert all(0.5 < example.duration_s < 20 for example in examples)
    info = audio.probe_audio(examples[0].audio)
    assert (info.rate_hz, info.channels, info.format) == (24_000, 1, "flac")
    assert len(audio.load_audio(examples[0].audio)) == round(16_000 * examples[0].duration_s)


def test_shards_of_opus_files():
    shards = f"{shared_data('rhvoice-pl')}/rhvoice-pl-{{00..05}}.tar"
    examples = list(islice(list_examples(shards, require_text=True), 20))
    assert [example.id for example in examples[:3]] == ["natan-00000", "michal-00001", "alicja-00002"]
    for example in examples:
        assert example.text.strip()
        recording = AudioBytes(example.audio, example.audio_bytes)
        assert audio.probe_audio(recording).channels == 1
        assert len(audio.load_audio(recording)) > 8_000
