"""A vocabulary and audio settings as the files beside a checkpoint, so that transformers reads it like any other."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from mowa.nouns import Preprocessing, Vocabulary

SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
DELIMITER = "|"


def vocabulary(alphabet: str) -> Vocabulary:
    """The vocabulary of a new head: special tokens, the delimiter, then the letters."""
    tokens = (*SPECIALS.values(), DELIMITER, *alphabet)
    return Vocabulary(tokens, blank=0, delimiter=tokens.index(DELIMITER), specials=frozenset({1, 2, 3}))


def processor(words: Vocabulary, sound: Preprocessing, out: Path) -> None:
    """vocab.json, tokenizer and feature extractor files into `out`."""
    vocab = out / "vocab.json"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(words.tokens)}, ensure_ascii=False, indent=1))
    named = {f"{role}_token": token for role, token in SPECIALS.items() if token in words.tokens}
    named["pad_token"] = words.tokens[words.blank]
    between = {} if words.delimiter is None else {"word_delimiter_token": words.tokens[words.delimiter]}
    Wav2Vec2CTCTokenizer(str(vocab), **between, **named).save_pretrained(out)
    (out / "special_tokens_map.json").write_text(json.dumps(named, indent=1))
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=sound.rate_hz,
        padding_value=sound.padding_value,
        do_normalize=sound.normalize,
        return_attention_mask=sound.attention_mask,
    ).save_pretrained(out)
