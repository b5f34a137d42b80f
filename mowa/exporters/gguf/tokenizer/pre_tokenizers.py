r"""The pre-tokenizers of llama.cpp: how each value of `tokenizer.ggml.pre` splits text into words before BPE merges.

`PRE_TOKENIZERS` maps every value to its regular expressions and flags, `split_words` applies them. Each expression cuts
every piece that the one before it left. `\p{NAME}` stands for a class of `unicode_classes`; expressions with such a
class match folded text, as in llama.cpp, so cases beyond ASCII are not told apart. Where an expression of a Hugging
Face tokenizer differs from what llama.cpp made of it, `rules` holds the former.

Source: llama-vocab.cpp and unicode.cpp of llama.cpp (MIT), build 11549. Build 10434 differs for deepseek-v3 only, where
it does not take `~` for a symbol, and lacks the names k2-horizon and spark2_5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from mowa.exporters.gguf.tokenizer.unicode_classes import expand_classes, fold, fold_spaces

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*")
_START = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{CONTRACTION}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{CONTRACTION}|{_START}\p{{L}}+|\p{{N}}|{_TAIL}"
QWEN35 = rf"{CONTRACTION}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}|{_TAIL}".replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_BAILING = "'(?i:[sdmt]|ll|ve|re)" + QWEN2.removeprefix(CONTRACTION).replace(r"\s*[\r\n]+", r"\s*[\r\n]")
BAILING = _BAILING.replace(r"\p{N}]?", r"\p{N}]?+").replace(r"\p{L}\p{N}]+", r"\p{L}\p{N}]++")
MINICPM5 = LLAMA3.replace("{1,3}", "+")

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_LOWER, _NOT_UPPER = r"[\p{NotLower}]", r"[\p{NotUpper}]"
_HAN_UPPER, _HAN_LOWER = (group.replace("]", r"&&[^\p{Han}]]") for group in (_UPPER, _LOWER))


def _by_case(upper: str, lower: str, end: str = "", start: str = _START) -> str:
    """Return the expression for a word of upper-case letters, lower-case letters, or the former then the latter."""
    return f"{start}{upper}*{lower}+{end}|{start}{upper}+{lower}*{end}"


O200K = rf"{_by_case(_UPPER, _LOWER, CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
_O200K = rf"{_by_case(_NOT_LOWER, _NOT_UPPER, CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
_O200K_MARKS = _O200K.replace(r"\p{NotLower}", r"\p{NotLower}\p{M}").replace(r"\p{NotUpper}", r"\p{NotUpper}\p{M}")
_CASELESS = rf"{_START}[\p{{L}}\p{{M}}]+{CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
TEKKEN = rf"{_by_case(_UPPER, _LOWER)}|\p{{N}}|{_SLASH_TAIL}"
_TEKKEN = rf"{_by_case(_NOT_LOWER, _NOT_UPPER)}|\p{{N}}|{_SLASH_TAIL}"
KIMI = rf"[\p{{Han}}]+|{_by_case(_HAN_UPPER, _HAN_LOWER, CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_TAIL}"
_KIMI = rf"\p{{Han}}+|{_START}[\p{{NotHan}}]+{CONTRACTION}?|\p{{N}}{{1,3}}|{_TAIL}"
K2_HORIZON = rf"{CONTRACTION}|{_START}(?:\p{{L}}|\p{{M}}|\u200C|\u200D)+|\p{{N}}{{1,3}}|{_TAIL}"
_K2_HORIZON = rf"{CONTRACTION}|{_START}[\p{{L}}\p{{M}}\p{{Joiner}}]+|\p{{N}}{{1,3}}|{_TAIL}"

KANJI_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_CODE_WORDS = rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
DEEPSEEK3 = rf"{_CODE_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPARK = rf"{_CODE_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_FULL_WIDTH = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_LLM = ("[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_FULL_WIDTH}]+", r"\s+\Z", ASIAN)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN, r"\p{N}")
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    f"\ufe30-\ufe4f]+|[\u3105-\u312f]+|{KANJI_KANA}"
)
_NOT_PUNCTUATED = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
# Groups of three digits from the right; what stands before the digits stays in one piece with the first group.
_DIGITS_FROM_THE_RIGHT = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_SPACES = "|".join([rf"\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1)] + [r"\s{1,2}(?!\S)", r"\s{1}"])
LINES = r"[^\n]+|[\n]+"
_FALCON_PUNCTUATION = r"[\p{P}$+<=>\^~|`]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp treats text under one value of `tokenizer.ggml.pre`.

    patterns       regular expressions, applied in turn
    rules          what Hugging Face tokenizers with this value have: tuples of expressions, the first as in `patterns`
    ignore_merges  whether a word that is a token is that token, whatever the merges say
    add_bos        whether the BOS token is added where the file does not say
    clean_spaces   whether spaces before punctuation are removed from decoded text
    byte_level     whether bytes are written as characters, as in GPT-2; otherwise spaces are U+2581
    """

    patterns: tuple[str, ...]
    rules: tuple[tuple[str, ...], ...]
    ignore_merges: bool = False
    add_bos: bool = False
    clean_spaces: bool = True
    byte_level: bool = True


def _rows() -> Iterator[tuple[str, PreTokenizer]]:
    def row(names: str, *patterns: str, rules: tuple[tuple[str, ...], ...] = (), **flags: bool) -> None:
        known = PreTokenizer(patterns, (patterns, *rules), **{"clean_spaces": False} | flags)
        rows.extend((name, known) for name in names.split())

    rows: list[tuple[str, PreTokenizer]] = []
    gpt2_names = (
        "gpt-2 mpt olmo phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4"
    )
    row("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", LLAMA3,
        ignore_merges=True, add_bos=True, clean_spaces=True)  # fmt: skip
    row("qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan solar-open grok-2", QWEN2)
    row("stablelm2 megrez", QWEN2, clean_spaces=True)
    row("qwen35", QWEN35)
    row(f"{gpt2_names} exaone4 jais jina-v1-en jina-v2-code roberta-bpe", GPT2, clean_spaces=True)
    row("trillion granite-docling", GPT2)
    row("smollm command-r", DIGIT, GPT2)
    row("starcoder refact codeshell exaone minerva-7b mellum2", DIGIT, GPT2, clean_spaces=True)
    row("dbrx smaug-bpe chatglm-bpe glm4", LLAMA3, clean_spaces=True)
    row("gpt-4o llama4 kanana2 talkie minimax-m2", _O200K, rules=((O200K,),))
    row("granite-embed-multi-97m", _O200K_MARKS, rules=((O200K,),), ignore_merges=True)
    row("tekken", _TEKKEN, rules=((TEKKEN,),), ignore_merges=True, add_bos=True)
    row("deepseek-llm", *_DEEPSEEK_LLM, r"\p{N}+", rules=((*_DEEPSEEK_LLM[:3], r"\s+$", ASIAN, DIGIT),))
    row("deepseek-coder", *_DEEPSEEK_CODER)
    row("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", r"\p{N}{1,3}", KANJI_KANA, DEEPSEEK3)
    row("spark2_5", r"\p{N}{1,3}", KANJI_KANA, SPARK, DIGIT)
    row("youtu", _YOUTU, _CASELESS.replace("{1,3}", ""), ignore_merges=True,
        rules=((_YOUTU, O200K.replace(r"\p{N}{1,3}", r"\p{N}")),))  # fmt: skip
    row("tiny_aya cohere2moe", _DIGITS_FROM_THE_RIGHT, _CASELESS, rules=((r"\d{1,3}(?=(?:\d{3})*\b)", O200K),))
    row("kimi-k2", _KIMI, rules=((KIMI,),))
    row("k2-horizon", _K2_HORIZON, rules=((K2_HORIZON,),))
    row("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))")
    row("bailingmoe bailingmoe2 llada-moe", _BAILING, rules=((BAILING,),))
    row("seed-coder", QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"))
    row("ufakzeka", QWEN2.removeprefix(f"{CONTRACTION}|"))
    row("afmoe", _DIGITS_FROM_THE_RIGHT, _AFMOE_ASIAN, DEEPSEEK3)
    row("laguna", LINES, QWEN2)
    row("exaone-moe", rf"{CONTRACTION}|{_START}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?"
        r"[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+", clean_spaces=True)  # fmt: skip
    row("minicpm5", r"\p{N}{1,3}", MINICPM5, ignore_merges=True, clean_spaces=True)
    row("jais-2", LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + _SPACES, clean_spaces=True)
    row("falcon", _FALCON_PUNCTUATION, GPT2, "[0-9][0-9][0-9]", clean_spaces=True,
        rules=((f"{PUNCTUATION}+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),))  # fmt: skip
    row("bloom gpt3-finnish", _NOT_PUNCTUATED, rules=((BLOOM,),), clean_spaces=True)
    row("poro-chat", _NOT_PUNCTUATED, rules=((BLOOM,),))
    row("viking", _NOT_PUNCTUATED, DIGIT, rules=((BLOOM, DIGIT),))
    row("chameleon", "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT,
        PUNCTUATION, GPT2, add_bos=True)  # fmt: skip
    row("sarvam-moe", LINES, byte_level=False)
    row("gemma4 granite-embed-multi-311m", LINES, byte_level=False, clean_spaces=True, add_bos=True)
    row("default", _FALCON_PUNCTUATION.replace("`", ""), GPT2, r"\p{N}+", "[0-9][0-9][0-9]", clean_spaces=True)
    yield from rows


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(dict(_rows()))
"""Values of `tokenizer.ggml.pre`; of those that do the same, the one to write comes first."""


@cache
def _compile(pattern: str) -> tuple[re.Pattern[str], bool]:
    """Return a compiled expression, and whether it matches folded text."""
    return re.compile(expand_classes(pattern), re.ASCII), r"\p{" in pattern


def split_words(text: str, patterns: tuple[str, ...]) -> list[str]:
    """Split text by regular expressions in turn: matches and what lies between them become pieces."""
    folded, spaced = fold(text), fold_spaces(text)
    ends = [len(text)] if text else []
    for pattern in patterns:
        expression, takes_classes = _compile(pattern)
        subject, cuts, start = folded if takes_classes else spaced, set(ends), 0
        for end in ends:
            for found in expression.finditer(subject, start, end):
                cuts.update(found.span())
            start = end
        ends = sorted(cuts - {0})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
