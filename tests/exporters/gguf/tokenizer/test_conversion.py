"""From tokenizers of transformers to GGUF metadata: every kind, proven by token ids, or refused with the reason."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.tokenizer import GGUFTokenizer, convert_tokenizer, tokenizer_metadata
from mowa.exporters.gguf.tokenizer.pre_tokenizers import LLAMA3, QWEN2
from mowa.exporters.gguf.tokenizer.vocabulary import Vocabulary, fit_vocabulary
from tests.exporters.gguf.tokenizer.trained import (
    BYTE_LEVEL,
    CHATML,
    GPT2_STEP,
    SPACE_PREPENDED,
    SPACES_ESCAPED,
    SPLIT_AT_SPACES,
    train_byte_level,
    train_sentencepiece,
    train_unigram,
    train_wordpiece,
)

KEY = "tokenizer.ggml."
OWN = ["A text of mine, with 123 words", "i drugi: żółw\n\tna końcu  zdania!"]


def edited(tokenizer, change):
    """Return a tokenizer whose JSON is changed."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    names = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **names)


def assert_same_ids(tokenizer, metadata, texts):
    found = GGUFTokenizer(metadata)
    for text in texts:
        for add_special in (False, True):
            expected = tokenizer(text, add_special_tokens=add_special)["input_ids"]
            assert found.encode(text, add_special) == expected, text


@pytest.fixture(scope="module")
def gpt2():
    return BYTE_LEVEL["gpt-2"]()


@pytest.fixture(scope="module")
def sentencepiece():
    return train_sentencepiece(SPACES_ESCAPED, SPLIT_AT_SPACES)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_the_pre_tokenizer_comes_from_the_rules(name):
    tokenizer = BYTE_LEVEL[name]()
    converted = convert_tokenizer(tokenizer, len(tokenizer), OWN)
    assert converted.metadata[KEY + "model"] == "gpt2"
    assert converted.metadata[KEY + "pre"] == name
    assert converted.report.checked > 5000
    assert not converted.report.unexplained
    assert bool(converted.warnings) == bool(converted.report.known)
    assert bool(converted.warnings) == (name in ("qwen2", "gpt-4o", "tekken"))
    assert_same_ids(tokenizer, converted.metadata, OWN)


def test_what_llama_cpp_does_otherwise_is_a_warning_with_an_example():
    tokenizer = BYTE_LEVEL["qwen2"]()
    converted = convert_tokenizer(tokenizer, len(tokenizer))
    assert len(converted.warnings) == 1
    assert converted.warnings[0].startswith("the normalizer NFC: llama.cpp does not normalize text: ")
    decomposed = "cafe\u0301 zu\u0308"
    with pytest.raises(ModelError, match=r"on a text of yours .the normalizer NFC"):
        convert_tokenizer(tokenizer, len(tokenizer), [decomposed])
    allowed = convert_tokenizer(tokenizer, len(tokenizer), [decomposed], allow_known_differences=True)
    assert any(one.text == decomposed for found in allowed.report.known.values() for one in found)


def test_unknown_expressions_are_accepted_if_they_split_alike():
    same = LLAMA3.replace(r"\p{N}{1,3}", r"\p{Nd}{1,3}|\p{N}{1,3}").replace(" ?[^", "[ ]?[^")
    tokenizer = train_byte_level([same.replace(r"\p{Nd}{1,3}|", "")])
    converted = convert_tokenizer(tokenizer, len(tokenizer))
    assert converted.metadata[KEY + "pre"] == "dbrx"
    assert "no pre-tokenizer of llama.cpp was made for the regular expressions" in converted.warnings[0]
    tokenizer = train_byte_level([r"\w+|\W+"])
    with pytest.raises(ModelError, match=r"no pre-tokenizer that splits text like .*\\w.*the nearest, '.*', splits '"):
        convert_tokenizer(tokenizer, len(tokenizer))


def test_ignored_merges_have_to_make_no_difference():
    tokenizer = train_byte_level([QWEN2], ignore_merges=True)
    assert tokenizer_metadata(tokenizer, len(tokenizer))[KEY + "pre"] == "qwen2"

    def lose_a_merge(spec):
        last = spec["model"]["merges"].pop()
        assert "".join(last) in spec["model"]["vocab"]

    with pytest.raises(ModelError, match=r"has ignore_merges=True and llama.cpp's 'qwen2' the opposite; its token"):
        convert_tokenizer(edited(tokenizer, lose_a_merge), len(tokenizer))


def test_special_tokens_and_the_chat_template(gpt2):
    gpt2 = edited(gpt2, lambda spec: None)
    gpt2.chat_template = CHATML
    metadata = tokenizer_metadata(gpt2, len(gpt2))
    ids = {token: gpt2.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert metadata[KEY + "eos_token_id"] == metadata[KEY + "eot_token_id"] == ids["<|im_end|>"]
    assert metadata[KEY + "padding_token_id"] == ids["<|endoftext|>"]
    assert KEY + "bos_token_id" not in metadata
    assert metadata[KEY + "add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == CHATML
    types = metadata[KEY + "token_type"]
    assert types.dtype == np.int32
    assert types[ids["<|im_end|>"]] == 3
    assert types[-1] == 1


def test_added_tokens_of_a_fine_tune(gpt2):
    gpt2 = edited(gpt2, lambda spec: None)
    gpt2.add_tokens(["<tool>", "</tool>", "żółw"])
    gpt2.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    converted = convert_tokenizer(gpt2, len(gpt2) + 60, ["<|user|>\n<tool>f(1)</tool> żółw.żółw"])
    types = converted.metadata[KEY + "token_type"]
    assert [int(types[gpt2.convert_tokens_to_ids(token)]) for token in ("<tool>", "żółw", "<|user|>")] == [4, 4, 3]
    assert converted.metadata[KEY + "tokens"][-1] == f"[PAD{len(gpt2) + 59}]"
    assert set(types[-60:]) == {5}
    assert not converted.warnings
    assert GGUFTokenizer(converted.metadata).decode(gpt2("a <tool> żółw")["input_ids"]) == "a <tool> żółw"


def test_more_tokens_than_embeddings(gpt2):
    gpt2 = edited(gpt2, lambda spec: None)
    gpt2.add_tokens(["<new>"])
    count = len(gpt2)
    with pytest.raises(ModelError, match=rf"{count} tokens and .* embeddings for {count - 1}: .*'<new>'"):
        convert_tokenizer(gpt2, count - 1)
    metadata = convert_tokenizer(gpt2, count - 1, drop_excess=True, allow_known_differences=True).metadata
    assert len(metadata[KEY + "tokens"]) == count - 1
    with pytest.raises(ModelError, match="resize_token_embeddings"):
        convert_tokenizer(gpt2, count - 2, drop_excess=True)


def test_white_space_beside_tokens_is_named(gpt2):
    gpt2 = edited(gpt2, lambda spec: None)
    gpt2.add_tokens([AddedToken("<mask>", lstrip=True, special=True), AddedToken("cat", single_word=True)])
    converted = convert_tokenizer(gpt2, len(gpt2))
    assert {warning.split(";")[0] for warning in converted.warnings} == {
        "the token '<mask>' takes white space beside it along",
        "the token 'cat' is found as a word of its own only",
    }


def test_llama_cpp_strips_beside_the_tokens_of_phi_3(sentencepiece):
    sentencepiece = edited(sentencepiece, lambda spec: None)
    tokens = [AddedToken("<|user|>", rstrip=True, special=True), AddedToken("<|endoftext|>", special=True)]
    sentencepiece.add_tokens(tokens)
    text = "<|user|>\n hello<|endoftext|> x"
    with pytest.raises(ModelError, match="takes white space beside it along"):
        convert_tokenizer(sentencepiece, len(sentencepiece), [text])
    metadata = convert_tokenizer(sentencepiece, len(sentencepiece), [text], model_name="Phi-3 mini").metadata
    assert_same_ids(sentencepiece, metadata | {"general.name": "Phi-3 mini"}, [text])
    with pytest.raises(DataError, match=r"named 'phi3' and has no token '<\|endoftext\|>'"):
        convert_tokenizer(train_sentencepiece(SPACES_ESCAPED), 900, model_name="phi3")


def test_names_that_llama_cpp_takes_for_special(gpt2):
    def rename(spec):
        vocab = spec["model"]["vocab"]
        last = max(vocab, key=vocab.get)
        vocab["</s>"] = vocab.pop(last)
        spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != last]

    converted = convert_tokenizer(edited(gpt2, rename), len(gpt2))
    assert converted.warnings[0].startswith("the token '</s>': llama.cpp takes it for special because of its name: ")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [(SPACES_ESCAPED, SPLIT_AT_SPACES, False), (SPACES_ESCAPED, None, False), (SPACE_PREPENDED, None, True)],
)
def test_sentencepiece_scores_come_from_the_ranks_of_merges(normalizer, pre_tokenizer, prefix):
    tokenizer = train_sentencepiece(normalizer, pre_tokenizer)
    converted = convert_tokenizer(tokenizer, len(tokenizer), OWN)
    metadata = converted.metadata
    assert not converted.warnings
    assert metadata[KEY + "model"] == "llama"
    assert metadata[KEY + "add_space_prefix"] is prefix
    assert metadata[KEY + "add_bos_token"] is True
    assert metadata[KEY + "scores"].dtype == np.float32
    types = metadata[KEY + "token_type"]
    assert [int(types[tokenizer.convert_tokens_to_ids(one)]) for one in ("<unk>", "<s>", "<0x0A>", "e")] == [2, 3, 6, 1]
    assert_same_ids(tokenizer, metadata, [*OWN, "</s>", " a", "a<s> b", "🙂\x00"])


def test_added_tokens_keep_the_order_by_score(sentencepiece):
    sentencepiece = edited(sentencepiece, lambda spec: None)
    sentencepiece.add_tokens(["there", "<tool>"])  # the first could be merged from tokens
    converted = convert_tokenizer(sentencepiece, len(sentencepiece) + 1, ["so there is a <tool>there"])
    assert converted.metadata[KEY + "model"] == "llama"
    assert not converted.warnings


def test_merges_without_an_order_by_score_stay_merges():
    tokenizer = train_sentencepiece(SPACES_ESCAPED, SPLIT_AT_SPACES)

    def reverse(spec):  # ranks of different tokens interleave, and words have no line ends
        merges = [pair for pair in spec["model"]["merges"] if "\n" not in "".join(pair)]
        spec["model"]["merges"] = [*merges[1::2], *merges[::2]]

    tokenizer = edited(tokenizer, reverse)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    converted = convert_tokenizer(tokenizer, len(tokenizer), OWN)
    assert (converted.metadata[KEY + "model"], converted.metadata[KEY + "pre"]) == ("gpt2", "sarvam-moe")
    assert any("'sarvam-moe'" in warning for warning in converted.warnings)
    assert_same_ids(tokenizer, converted.metadata, OWN)


def test_a_space_before_the_first_text_only_is_named():
    tokenizer = train_sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    converted = convert_tokenizer(tokenizer, len(tokenizer), ["no space here", "one\nmore"])
    assert sorted(warning.split(":")[0] for warning in converted.warnings) == [
        "a space is put before the first text only",
        "no space is put before text that begins with one",
    ]
    with pytest.raises(ModelError, match=r"a text of yours .a space is put before the first text only"):
        convert_tokenizer(tokenizer, len(tokenizer), ["a</s>b"])


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(lowercase):
    tokenizer = train_wordpiece(lowercase)
    texts = ["The Quick 12 foxes, don't!", "Szczebrzeszyn - 1998 (gdzie?)"]
    converted = convert_tokenizer(tokenizer, len(tokenizer) + 3, texts)
    metadata = converted.metadata
    assert metadata[KEY + "model"] == "bert"
    assert metadata[KEY + "normalizer.lowercase"] is lowercase
    assert metadata[KEY + "bos_token_id"] == metadata[KEY + "cls_token_id"] == 2
    assert metadata[KEY + "seperator_token_id"] == 3
    assert {"▁the", "[CLS]"} <= set(metadata[KEY + "tokens"])
    assert any(warning.startswith("words of more than 100 characters") for warning in converted.warnings)
    assert_same_ids(tokenizer, metadata, texts)


def test_unigram():
    tokenizer = train_unigram()
    converted = convert_tokenizer(tokenizer, len(tokenizer), ["the quick brown fox", "345 dogs"])
    metadata = converted.metadata
    assert metadata[KEY + "model"] == "t5"
    assert metadata[KEY + "remove_extra_whitespaces"] is True
    assert metadata[KEY + "add_eos_token"] is True
    assert metadata[KEY + "unknown_token_id"] == 2
    assert_same_ids(tokenizer, metadata, ["the quick brown fox", "345 dogs"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(dropout=0.1), "dropout=0.1"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), r"llama.cpp has no Lowercase\(\), .* normalizer"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(add_prefix_space=True), "add_prefix_space=True"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "llama.cpp has no Whitespace"),
        (lambda s: s.update(pre_tokenizer=None), "neither ByteLevel nor byte_fallback"),
    ],
)
def test_rules_that_llama_cpp_cannot_follow_are_refused(gpt2, change, message):
    with pytest.raises(ModelError, match=message):
        convert_tokenizer(edited(gpt2, change), len(gpt2))


def test_other_vocabularies_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ModelError, match="the tokenizer's model is WordLevel"):
        convert_tokenizer(words, 1)
    with pytest.raises(ModelError, match="is a slow tokenizer without"):
        convert_tokenizer(object(), 1)
    bert = edited(train_wordpiece(), lambda s: s.update(normalizer=None))
    with pytest.raises(ModelError, match="another normalizer than BertNormalizer"):
        convert_tokenizer(bert, 2000)


def test_special_tokens_around_the_text(gpt2):
    eos, start = (gpt2.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))

    def surrounded(single, ids):
        found = edited(gpt2, lambda spec: None)
        found.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
        return found

    metadata = tokenizer_metadata(surrounded("$A <|im_end|>", [("<|im_end|>", eos)]), len(gpt2))
    assert (metadata[KEY + "add_bos_token"], metadata[KEY + "add_eos_token"]) == (False, True)
    with pytest.raises(ModelError, match=r"puts '<\|im_start\|>' before a text and none after it"):
        convert_tokenizer(surrounded("<|im_start|> $A", [("<|im_start|>", start)]), len(gpt2))


def test_a_text_with_two_ids_is_refused():
    with pytest.raises(ModelError, match="the token 'a' has the ids 0 and 2"):
        fit_vocabulary(Vocabulary(["a", "b", "a"], [1, 1, 1]), 3)
    padded = fit_vocabulary(Vocabulary(["a", "[PAD2]"], [1, 1]), 3)
    assert padded.tokens == ["a", "[PAD2]", "[PAD2_3]"]


def test_a_difference_is_refused_with_the_first_text(gpt2, monkeypatch):
    encode = GGUFTokenizer.encode
    monkeypatch.setattr(
        GGUFTokenizer, "encode", lambda self, text, *more: encode(self, text.replace("fox", "fix"), *more)
    )
    with pytest.raises(ModelError, match=r"differs from transformers on a text of yours: 'a fox': from token \d+ on"):
        convert_tokenizer(gpt2, len(gpt2), ["a dog", "a fox", "two foxes"])
    with pytest.raises(ModelError, match="on a text of the built-in comparison: 'The quick brown fox"):
        convert_tokenizer(gpt2, len(gpt2))


def test_steps_of_the_normalizer_that_change_spaces():
    tokenizer = train_unigram(normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]))
    assert tokenizer_metadata(tokenizer, len(tokenizer))[KEY + "remove_extra_whitespaces"] is True


def test_gpt2_step_is_the_expression(gpt2):
    assert GPT2_STEP.use_regex
    assert tokenizer_metadata(gpt2, len(gpt2))[KEY + "pre"] == "gpt-2"
