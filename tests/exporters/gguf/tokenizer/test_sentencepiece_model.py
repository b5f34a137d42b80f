"""SentencePiece model files of slow tokenizers."""

import struct
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.tokenizer import GGUFTokenizer, convert_tokenizer
from mowa.exporters.gguf.tokenizer.sentencepiece_model import BPE, UNIGRAM, read_sentencepiece

PIECES = [
    *(("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<tool>", 0.0, 4)),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    *(("▁a", -1.0, 1), ("ab", -0.5, 1), ("▁", -9.0, 1), ("a", -9.0, 1), ("b", -9.0, 1)),
]


ADDED = {index: AddedToken(text, special=kind != 4) for index, (text, _, kind) in enumerate(PIECES[:4])}


def varint(number):
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + varint(number >> 7)


def field(number, value):
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model_file(kind=BPE, pieces=PIECES, **normalizer):
    """Return the bytes of a model file; `normalizer`: fields by name."""
    numbers = {"name": 1, "charsmap": 2, "add_dummy_prefix": 3, "remove_extra_whitespaces": 4}
    rows = b"".join(field(1, field(1, text) + field(2, score) + field(3, type_)) for text, score, type_ in pieces)
    rules = b"".join(field(numbers[name], value) for name, value in normalizer.items())
    return rows + field(2, field(1, "corpus.txt") + field(3, kind) + field(4, 8000)) + field(3, rules)


class Slow(SimpleNamespace):
    """A slow tokenizer that knows a few texts."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + self.reader.encode(text, add_special=False)

    def decode(self, ids, skip_special_tokens=False):
        return self.reader.decode(ids)


def slow(path, pieces=PIECES, **changes):
    reader = GGUFTokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
            "tokenizer.ggml.scores": [score for _, score, _ in pieces],
            "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        }
    )
    ids = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Slow(vocab_file=str(path), reader=reader, added_tokens_decoder=ADDED, **ids | changes)


def test_pieces_and_rules_are_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file(charsmap=b"\0\0\0\0x", add_dummy_prefix=0, remove_extra_whitespaces=0))
    model = read_sentencepiece(path)
    assert list(zip(model.pieces, model.scores, model.types, strict=True)) == PIECES
    assert (model.kind, model.charsmap) == (BPE, b"\0\0\0\0x")
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (False, False)
    path.write_bytes(model_file(kind=UNIGRAM))
    model = read_sentencepiece(path)
    assert (model.kind, model.add_dummy_prefix, model.remove_extra_whitespaces) == (UNIGRAM, True, True)


def test_a_slow_tokenizer_is_exported_with_its_own_scores(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file(remove_extra_whitespaces=0))
    converted = convert_tokenizer(slow(path), len(PIECES) + 2, ["ab <tool> aab"])
    metadata = converted.metadata
    assert not converted.warnings
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{len(PIECES) + 1}]"
    assert [float(score) for score in metadata["tokenizer.ggml.scores"][260:262]] == [-1.0, -0.5]
    assert list(metadata["tokenizer.ggml.token_type"][:5]) == [2, 3, 3, 4, 6]
    assert metadata["tokenizer.ggml.add_bos_token"] is True


def test_normalization_of_the_model_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file())
    other = slow(path)
    reader = other.reader
    other.reader = SimpleNamespace(
        encode=lambda text, add_special: reader.encode(" ".join(text.split()), add_special), decode=reader.decode
    )
    converted = convert_tokenizer(other, len(PIECES))
    assert [warning.split(":")[0] for warning in converted.warnings] == ["white space"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no pieces"),
        (model_file()[:-3], "ends after the file"),
        (b"\xff" * 20, "64 bits"),
        (b"\x0b", "type 3"),
    ],
)
def test_damaged_files(tmp_path, data, message):
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(DataError, match=f"is not a SentencePiece model.*{message}"):
        read_sentencepiece(tmp_path / "x.model")


def test_other_kinds_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file(kind=4))
    with pytest.raises(ModelError, match=r"has the type 4; llama.cpp has 1 .unigram. and 2 .BPE."):
        convert_tokenizer(slow(path), len(PIECES))
    with pytest.raises(ModelError, match="Slow is a slow tokenizer without a SentencePiece model"):
        convert_tokenizer(slow(tmp_path / "missing.model"), len(PIECES))
