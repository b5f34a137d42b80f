"""The character map of unigram vocabularies, against the implementation of the tokenizers package."""

import base64
import json
import struct
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mowa.errors import DataError
from mowa.exporters.gguf.tokenizer.charsmap import CharsMap
from mowa.exporters.gguf.tokenizer.subword_models import build_trie

REPLACEMENTS = {"ﬁ": "fi", "Å": "Å", "①": "1", "a\u0301": "á", "a": "b", "\t": " ", "ﷺ": "x y", "½": "", "ー": "-"}


def make_map(replacements):
    """Return a map: its size, an XOR-compressed double array over UTF-8, and replacements that end with zero bytes."""
    trie, texts = {}, b""
    for source, target in replacements.items():
        node = trie
        for byte in source.encode():
            node = node.setdefault(byte, {})
        node[0], texts = len(texts), texts + target.encode() + b"\0"
    units, bases = [0] * 8192, iter(range(256, 8192, 256))  # a base of its own for every node

    def place(node, position):
        base = next(bases)
        units[position] |= (position ^ base) << 10 | (1 << 8 if 0 in node else 0)
        for label, child in node.items():
            if label == 0:
                units[base] = child | 1 << 31
            else:
                units[base ^ label] |= label
                place(child, base ^ label)

    place(trie, 0)
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + texts


@cache
def normalizer():
    spec = json.loads(Tokenizer(models.BPE()).to_str())
    data = base64.b64encode(make_map(REPLACEMENTS)).decode()
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": data}
    return Tokenizer.from_str(json.dumps(spec)).normalizer


@given(parts=st.lists(st.sampled_from([*"ﬁÅ①ab\tﷺ½ー中🙂x "]), max_size=12))
def test_replacements_are_those_of_the_tokenizers_package(parts):
    text = "".join(parts)
    found = b"".join(CharsMap(make_map(REPLACEMENTS), {}).normalize(text.encode())).decode()
    assert found == normalizer().normalize_str(text)


def test_the_longest_prefix_is_replaced():
    charsmap = CharsMap(make_map(REPLACEMENTS), {})
    assert charsmap.normalize("a\u0301a①é".encode()) == ["á".encode(), b"b", b"1", "é".encode()]
    assert charsmap.normalize(b"x\xffy") == [b"x", "\ufffd".encode(), b"y"]


def test_user_defined_tokens_are_left_alone():
    charsmap = CharsMap(make_map(REPLACEMENTS), build_trie({b"<a>": 0}))
    assert b"".join(charsmap.normalize(b"a<a>a<b>")) == b"b<a>b<b>"


def test_no_map():
    assert CharsMap(b"", {}).normalize("aż".encode()) == [b"a", "ż".encode()]


def test_damaged_maps():
    data = make_map(REPLACEMENTS)
    with pytest.raises(DataError, match="announces a trie of 32768"):
        CharsMap(data[:100], {})
    with pytest.raises(DataError, match="outside its trie"):
        CharsMap(struct.pack("<II", 4, 1 << 20) + b"\0", {}).normalize(b"a")
    with pytest.raises(DataError, match="outside its replacements"):
        CharsMap(data[: 4 + 4 * 8192], {}).normalize(b"a")
