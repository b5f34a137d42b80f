"""Read SentencePiece model files, which slow tokenizers have instead of tokenizer.json.

The file is a protobuf message. Its types of pieces have the numbers that GGUF uses.

Source: sentencepiece_model.proto of SentencePiece (Apache-2.0).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mowa.errors import DataError

UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass
class SentencePieceModel:
    """What a model file says.

    pieces                    text by id
    scores                    by id
    types                     `TokenType` by id
    kind                      UNIGRAM or BPE; others exist
    charsmap                  precompiled normalization, may be empty
    add_dummy_prefix          whether a space is put before text
    remove_extra_whitespaces  whether runs of spaces, and those around text, are removed
    """

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    kind: int = UNIGRAM
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a model file. Raises DataError if it is not one, or is damaged."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                _read_piece(model, value)
            elif number == 2:
                model.kind = next((int(one) for key, one in _fields(value) if key == 3), UNIGRAM)
            elif number == 3:
                _read_normalizer(model, value)
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise DataError(f"{path} is not a SentencePiece model, or is damaged: {error}") from None
    if not model.pieces:
        raise DataError(f"{path} is not a SentencePiece model: it has no pieces")
    return model


def _read_piece(model: SentencePieceModel, data: bytes) -> None:
    values = dict(_fields(data))
    model.pieces.append(bytes(values.get(1, b"")).decode())
    model.scores.append(float(values.get(2, 0.0)))
    model.types.append(int(values.get(3, 1)))


def _read_normalizer(model: SentencePieceModel, data: bytes) -> None:
    values = dict(_fields(data))
    model.charsmap = bytes(values.get(2, b""))
    model.add_dummy_prefix = bool(values.get(3, True))
    model.remove_extra_whitespaces = bool(values.get(4, True))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Return number and value of the fields of a message: an int, a float or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError(f"a field of {size} bytes ends after the file")
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            yield tag >> 3, struct.unpack_from("<f" if size == 4 else "<d", data, at)[0]
            at += size
        else:
            raise ValueError(f"a field has the type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
