"""A vocabulary and audio settings as the files beside a net, so that transformers reads them like any other's.

What the net is, or whether it is whole or an adapter, is not known here.
"""

from __future__ import annotations

import json
from pathlib import Path

from mowa.types import Preprocessing, Vocabulary

# Which of the special tokens of a vocabulary a tokenizer calls what; checkpoints spell them in these ways.
_ROLES = {
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": ("<s>", "[BOS]", "[CLS]"),
    "eos_token": ("</s>", "[EOS]", "[SEP]"),
}


def write_processor(vocabulary: Vocabulary, preprocessing: Preprocessing, folder: Path) -> None:
    """vocab.json and the files of tokenizer and feature extractor into `out`, as transformers reads them."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

    vocab = folder / "vocab.json"
    vocab.write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary.tokens)}, ensure_ascii=False, indent=1),
        encoding="utf-8",
    )
    special = {vocabulary.tokens[index] for index in vocabulary.specials}
    named: dict[str, str | None] = {
        role: next((token for token in spellings if token in special), None) for role, spellings in _ROLES.items()
    }
    named["pad_token"] = vocabulary.tokens[vocabulary.blank]
    others = sorted(special - set(named.values()))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(vocab),
        word_delimiter_token=None if vocabulary.delimiter is None else vocabulary.tokens[vocabulary.delimiter],
        **named,
    )
    if others:
        tokenizer.add_tokens(others, special_tokens=True)
    tokenizer.save_pretrained(folder)
    written = {role: token for role, token in named.items() if token is not None}
    (folder / "special_tokens_map.json").write_text(json.dumps(written, ensure_ascii=False, indent=1), encoding="utf-8")
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=preprocessing.rate_hz,
        padding_value=preprocessing.padding_value,
        do_normalize=preprocessing.normalize,
        return_attention_mask=preprocessing.attention_mask,
    ).save_pretrained(folder)
