"""Tokenizers of every kind, trained on a few texts in well under a second."""

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mowa.exporters.gguf.tokenizer.battery import hard_texts
from mowa.exporters.gguf.tokenizer.pre_tokenizers import (
    BAILING,
    BLOOM,
    DEEPSEEK3,
    K2_HORIZON,
    KANJI_KANA,
    LLAMA3,
    O200K,
    PRE_TOKENIZERS,
    QWEN2,
    QWEN35,
    TEKKEN,
)

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GPT2_STEP = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SPACES_ESCAPED = normalizers.Replace(" ", "▁")
SPACE_PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), SPACES_ESCAPED])
SPLIT_AT_SPACES = pre_tokenizers.Split(" ", "merged_with_previous")


@cache
def corpus():
    """Texts to train on: none has a NUL, U+2581 or what special tokens begin with."""
    english = "the quick brown fox and 12 of 345 dogs don't sleep; she'll see that there are 1000000 of them. "
    polish = "Zażółć gęślą jaźń w Szczebrzeszynie, gdzie chrząszcz brzmi w trzcinie od 1998 roku. "
    code = "def f(x):\n    return [y for y in x if y != 0]\n\nfor (int i = 0; i < n; ++i) { a[i] += b; }\n"
    texts = [english * 3, polish * 3, code * 3, *hard_texts()]
    return [text for text in texts if not {*"<[\0\u2581"} & {*text}]


def train_byte_level(steps, special=CHAT_TOKENS, vocab_size=700, **options):
    """Train a byte-level BPE; `steps` are pre-tokenizers, or regular expressions to split by."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=options.pop("ignore_merges", False)))
    if "normalizer" in options:
        tokenizer.normalizer = options["normalizer"]
    split = [pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step for step in steps]
    end = [] if split[-1] is GPT2_STEP else [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, *end])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], pad_token=special[0])


def train_sentencepiece(normalizer, pre_tokenizer=None, *, complete=True, **model):
    """Train a BPE with byte fallback; `complete`: with a merge for every way to make a token, as in SentencePiece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **{"byte_fallback": True, "fuse_unk": True} | model))
    tokenizer.normalizer = normalizer or normalizers.Sequence([])
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text for text in corpus() if text.isascii()], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    if complete:
        vocab, made = spec["model"]["vocab"], dict.fromkeys("".join(pair) for pair in spec["model"]["merges"])
        splits = ((token[:cut], token[cut:]) for token in made for cut in range(1, len(token)))
        spec["model"]["merges"] = [list(pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def train_wordpiece(lowercase=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def train_unigram(normalizer=None):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer or normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text for text in corpus() if text.isascii()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _deepseek_coder():
    steps = [*PRE_TOKENIZERS["deepseek-coder"].patterns[:4], pre_tokenizers.Digits(individual_digits=True)]
    return train_byte_level(steps)


BYTE_LEVEL = {
    "gpt-2": lambda: train_byte_level([GPT2_STEP]),
    "smollm": lambda: train_byte_level([pre_tokenizers.Digits(individual_digits=True), GPT2_STEP]),
    "llama-bpe": lambda: train_byte_level([LLAMA3], ignore_merges=True),
    "dbrx": lambda: train_byte_level([LLAMA3]),
    "qwen2": lambda: train_byte_level([QWEN2], normalizer=normalizers.NFC()),
    "qwen35": lambda: train_byte_level([QWEN35]),
    "deepseek-v3": lambda: train_byte_level([r"\p{N}{1,3}", KANJI_KANA, DEEPSEEK3]),
    "deepseek-coder": _deepseek_coder,
    "gpt-4o": lambda: train_byte_level([O200K]),
    "tekken": lambda: train_byte_level([TEKKEN], ignore_merges=True),
    "bloom": lambda: train_byte_level([BLOOM]),
    "bailingmoe": lambda: train_byte_level([BAILING]),
    "k2-horizon": lambda: train_byte_level([K2_HORIZON]),
}
"""Value of `tokenizer.ggml.pre` → a function that trains a tokenizer with its rules."""
