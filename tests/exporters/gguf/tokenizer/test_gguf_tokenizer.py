"""Token ids from GGUF metadata alone. Expected ids of llama.cpp's own vectors, and of libllama where it is said."""

import os
from pathlib import Path

import numpy as np
import pytest

from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.tokenizer import GGUFTokenizer
from mowa.exporters.gguf.tokenizer.gguf_tokenizer import BYTE_CHARACTERS
from mowa.exporters.gguf.tokenizer.special_tokens import SpecialTokens
from mowa.io.gguf import open_writer, read_gguf

VECTORS = "MOWA_GGUF_VOCAB"  # folder with ggml-vocab-*.gguf and their .inp and .out from models/ of llama.cpp
KEY = "tokenizer.ggml."
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def metadata(model, tokens, types=None, **entries):
    """Return metadata; `types`: token → type, 1 for others."""
    kinds = [(types or {}).get(token, 6 if token in BYTES else 1) for token in tokens]
    found = {KEY + "model": model, KEY + "tokens": tokens, KEY + "token_type": np.array(kinds, np.int32)}
    return found | {KEY + key.replace("normalizer_", "normalizer."): value for key, value in entries.items()}


def byte_level(*more, merges=(), types=None, **entries):
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*BYTE_CHARACTERS, *joined, *more]
    return metadata("gpt2", tokens, types, merges=list(merges), **{"pre": "gpt-2"} | entries)


def pieces(tokenizer, text, **options):
    return [tokenizer.tokens[index] for index in tokenizer.encode(text, **{"add_special": False} | options)]


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3", "deepseek-coder", "bert-bge"])
def test_llama_cpp_vectors(name):
    folder = os.environ.get(VECTORS)
    if not folder:
        pytest.skip(f"{VECTORS} is not set")
    path = Path(folder) / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{path}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text("utf-8").split("\n")
    tokenizer = GGUFTokenizer(read_gguf(path).metadata)
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == [int(one) for one in line.split()], (
            text
        )


def test_merges_by_rank_and_leftmost_first():
    tokenizer = GGUFTokenizer(byte_level(merges=["b c", "a b", "a a", "aa a", "Ġ a"]))
    assert pieces(tokenizer, "abc aaaaa") == ["a", "bc", "Ġ", "aa", "aaa"]
    assert pieces(tokenizer, "aaaaaaa") == ["aa", "aa", "aaa"]
    assert pieces(tokenizer, "é\n") == ["Ã", "©", "Ċ"]


def test_a_word_that_is_a_token_is_taken_whole_where_merges_are_ignored():
    tokens = byte_level("abc", merges=["b c"], pre="llama-bpe", add_bos_token=False)
    assert pieces(GGUFTokenizer(tokens), "abc abc") == ["abc", "Ġ", "a", "bc"]
    assert pieces(GGUFTokenizer(tokens | {KEY + "pre": "dbrx"}), "abc") == ["a", "bc"]


def test_spaces_are_escaped_and_bytes_spelled_without_byte_level():
    merges = ["▁ a", "\n \n"]
    tokens = metadata("gpt2", [*BYTES, "▁", "a", "b", "▁a", "\n", "\n\n"], merges=merges, pre="sarvam-moe")
    assert pieces(GGUFTokenizer(tokens), "a ab\n\n\né") == [*("a", "▁a", "b", "\n\n", "\n", "<0xC3>", "<0xA9>")]
    assert GGUFTokenizer(tokens).decode([256 + 3, 0xC3, 0xA9]) == " aé"
    gemma = GGUFTokenizer(tokens | {KEY + "model": "gemma4", KEY + "bos_token_id": 1, KEY + "add_bos_token": False})
    assert gemma.encode("\n\n") == [1, 256 + 5]  # llama.cpp adds BOS for Gemma 4 whatever the file says


def test_merges_by_score_and_byte_fallback():
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "▁a", "ab", "▁ab"]
    scores = np.array([0.0] * (len(tokens) - 3) + [-2.0, -1.0, -3.0], np.float32)
    entries = metadata("llama", tokens, {"<unk>": 2, "<s>": 3, "</s>": 3}, scores=scores)
    tokenizer = GGUFTokenizer(entries)
    assert tokenizer.encode("") == [1]
    assert pieces(tokenizer, "ab a") == ["▁ab", "▁a"]
    assert pieces(tokenizer, "aab") == ["▁a", "ab"]
    assert pieces(tokenizer, "é</s>b") == ["▁", "<0xC3>", "<0xA9>", "</s>", "▁", "b"]
    assert pieces(tokenizer, "</s>", parse_special=False)[0] == "▁"
    assert tokenizer.decode(tokenizer.encode("ab é"), skip_special=True) == " ab é"  # libllama: BOS keeps the space
    without = GGUFTokenizer(entries | {KEY + "add_space_prefix": False, KEY + "add_bos_token": False})
    assert pieces(without, "ab") == ["ab"]
    missing = metadata("llama", ["<unk>", "<s>", "</s>", "▁", "a"])
    with pytest.raises(DataError, match="neither 'b' nor <0x62>"):
        GGUFTokenizer(missing).encode("b")


def test_wordpiece_words():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁he", "llo", "▁,", "▁中", "▁zu", "▁k", "▁$", "b", "▁É"]
    ids = {"unknown_token_id": 1, "bos_token_id": 2, "seperator_token_id": 3}
    tokenizer = GGUFTokenizer(metadata("bert", tokens, {"[CLS]": 3, "[SEP]": 3}, **ids))
    assert tokenizer.encode("Hello,中") == [2, 4, 5, 6, 7, 3]
    assert pieces(tokenizer, "ZU\u0301\x01K $b hx") == ["[UNK]", "▁$", "[UNK]", "[UNK]"]
    assert pieces(tokenizer, "zú") == ["▁zu"]
    assert tokenizer.decode([4, 5, 6]) == " hello,"
    cased = metadata("bert", tokens, **ids, normalizer_lowercase=False)
    assert pieces(GGUFTokenizer(cased), "É E") == ["▁É", "[UNK]"]


def test_unigram_takes_the_most_probable_pieces():
    tokens = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁ab", "c"]
    scores = np.array([0, 0, 0, -3, -2, -2, -3.5, -8, -1], np.float32)
    types = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    tokenizer = GGUFTokenizer(metadata("t5", tokens, types, scores=scores, add_space_prefix=True))
    assert pieces(tokenizer, "ab") == ["▁", "ab"]
    assert pieces(tokenizer, "axyzb") == ["▁", "a", "<unk>", "b"]
    assert tokenizer.encode("c") == [3, 8, 1]
    merged = metadata("t5", tokens, types, scores=scores, remove_extra_whitespaces=True)
    assert pieces(GGUFTokenizer(merged), "  a   b ") == ["▁", "a", "▁", "b"]
    assert pieces(tokenizer, " a  b") == ["▁", "▁", "a", "▁", "▁", "b"]  # libllama: the prefix is put before the word
    own = metadata("t5", tokens, types | {"c": 4}, scores=scores, add_space_prefix=False)
    assert pieces(GGUFTokenizer(own), "acb") == ["a", "c", "b"]


def test_special_tokens_are_found_longest_first():
    types = {"<a>": 3, "<a><b>": 3, "tool": 4, "<x>": 5}
    tokenizer = GGUFTokenizer(byte_level("<a>", "<a><b>", "tool", "<x>", types=types))
    assert pieces(tokenizer, "<a><a><b>tool<x>") == ["<a>", "<a><b>", "tool", "<", "x", ">"]
    assert pieces(tokenizer, "<a>tool", parse_special=False) == ["<", "a", ">", "tool"]
    assert tokenizer.decode(tokenizer.encode("<a>x", add_special=False), skip_special=True) == "x"
    assert tokenizer.decode(tokenizer.encode("<a>x", add_special=False)) == "<a>x"


def test_names_change_types():
    tokens = [
        "</s>",
        "<|im_end|>",
        "<|start|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
        "<|tool_response>",
        "<PRE>",
        "[PAD]",
    ]
    special = SpecialTokens(tokens, [1] * len(tokens), {})
    assert [tokens[index] for index in sorted(special.hidden)] == [
        *("<|im_end|>", "<|call|>", "<|return|>", "<|tool_response>", "<PRE>", "[PAD]")
    ]
    assert {tokens[index] for index in special.found - special.hidden} == {"<|start|>", "<|end|>"}
    explicit = SpecialTokens(tokens, [1] * len(tokens), {KEY + "prefix_token_id": 0, KEY + "fim_pad_token_id": 0})
    assert not {tokens[index] for index in explicit.found} & {"<PRE>", "[PAD]"}
    assert SpecialTokens(["</s>"], [1], {}).hidden == {0}


def test_white_space_beside_tokens_by_the_name_of_the_model():
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<mask>"]
    phi = SpecialTokens(tokens, [3] * 6, {"general.name": "My Phi-3"})
    assert phi.split("<|user|> \n a<s> b </s> <mask>", True) == [4, "a", 1, " b ", 2, 5]
    jina = SpecialTokens(tokens, [3] * 6, {KEY + "pre": "jina-v2-de"})
    assert jina.split("a \n<mask> b", True) == ["a", 5, " b"]
    assert SpecialTokens(tokens, [3] * 6, {}).split("a <mask> b", True) == ["a ", 5, " b"]
    with pytest.raises(DataError, match="is named 'phi3'"):
        SpecialTokens(["a"], [1], {"general.name": "Phi3"})


def test_bos_and_eos():
    entries = byte_level("<s>", "</s>", types={"<s>": 3, "</s>": 3}, bos_token_id=256, eos_token_id=257)
    assert GGUFTokenizer(entries).encode("a") == [97]
    both = entries | {KEY + "add_bos_token": True, KEY + "add_eos_token": True}
    assert GGUFTokenizer(both).encode("a") == [256, 97, 257]
    assert GGUFTokenizer(entries | {KEY + "pre": "llama-bpe"}).encode("a") == [256, 97]
    assert GGUFTokenizer(entries | {KEY + "pre": "llama-bpe"}).encode("a", add_special=False) == [97]
    no_bos = metadata("gpt2", ["a"], merges=[], pre="gpt-2", add_bos_token=True)
    with pytest.raises(DataError, match="add_bos_token is true and bos_token_id is not set"):
        GGUFTokenizer(no_bos)


def test_decoding_cleans_spaces_as_the_pre_tokenizer_says():
    entries = byte_level()
    text = "Hello , it 's me ! ' x ' d"
    assert GGUFTokenizer(entries).decode(GGUFTokenizer(entries).encode(text)) == "Hello, it's me!'x'd"
    assert GGUFTokenizer(entries | {KEY + "pre": "qwen2"}).decode(GGUFTokenizer(entries).encode(text)) == text
    assert GGUFTokenizer(entries).decode([BYTE_CHARACTERS.index("Ã")]) == "\ufffd"


def test_a_file_is_read_as_it_was_written(tmp_path):
    entries = byte_level("<s>", merges=["a b"], types={"<s>": 3}, bos_token_id=257, add_bos_token=True)
    with open_writer(tmp_path / "x.gguf", {"general.architecture": "llama", **entries}, {}):
        pass
    read = read_gguf(tmp_path / "x.gguf").metadata
    assert GGUFTokenizer(read).encode("ab<s>ż") == GGUFTokenizer(entries).encode("ab<s>ż") == [257, 256, 257, 197, 188]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "rwkv"}, ModelError, "is 'rwkv'; supported are llama, gpt2"),
        ({"pre": "nonesuch"}, ModelError, "the pre-tokenizer 'nonesuch' is unknown"),
        ({"tokens": ["a", "b", "a"]}, DataError, "the token 'a' is in the vocabulary twice"),
        ({"token_type": [1, 1]}, DataError, "token_type has 2 values for 256 tokens"),
        ({"merges": None}, DataError, "has no tokenizer.ggml.merges"),
        ({"model": None}, DataError, "holds no tokenizer"),
    ],
)
def test_damaged_metadata(change, error, message):
    entries = byte_level() | {KEY + key: value for key, value in change.items()}
    with pytest.raises(error, match=message):
        GGUFTokenizer({key: value for key, value in entries.items() if value is not None})


def test_text_that_is_not_unicode():
    with pytest.raises(DataError, match="no UTF-8 form: surrogates not allowed at character 1"):
        GGUFTokenizer(byte_level()).encode("a\ud800")


def test_tokens_end_at_a_nul_as_in_c():
    tokenizer = GGUFTokenizer(metadata("llama", ["<unk>", "<s>", "</s>", "\0", "x\0y", *BYTES]))
    assert tokenizer.tokens[3:5] == ["[EMPTY_3]", "x"]
