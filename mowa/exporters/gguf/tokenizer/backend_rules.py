"""Rules of a Hugging Face tokenizer, read from its JSON: the steps of its normalizer and of its pre-tokenizer.

Pre-tokenizers are brought to one form, a sequence of regular expressions, each of which cuts every piece that the one
before it left. Two tokenizers with the same sequence split every text in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mowa.exporters.gguf.tokenizer.pre_tokenizers import CONTRACTION, DIGIT, GPT2, PUNCTUATION

_SPELLINGS = {
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTION,
    r"\p{N}{1}": DIGIT,
    "\r": r"\r",
    "\n": r"\n",
}  # of expressions that are the same
_ISOLATING = (("Isolated", False), ("Removed", True))  # behaviors that keep every match as a piece


def flatten(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, those of nested sequences in order."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    inner = step.get("normalizers") or step.get("pretokenizers") or []
    return [part for one in inner for part in flatten(one)]


def canonical(expression: str) -> str:
    """Return one spelling of a regular expression of a pre-tokenizer."""
    for spelling, known in _SPELLINGS.items():
        expression = expression.replace(spelling, known)
    return expression if expression + r"|\s+" != GPT2 else GPT2


def expressions(steps: list[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """Return the steps of a pre-tokenizer as regular expressions; None if a step has no such form."""
    found: list[str] = []
    for step in steps:
        kind = step["type"]
        if kind == "Digits":
            found.append(DIGIT if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel":
            found += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Punctuation" and step.get("behavior", "Isolated") in ("Isolated", "Contiguous"):
            found.append(PUNCTUATION + ("+" if step.get("behavior") == "Contiguous" else ""))
        elif kind == "Split" and (step["behavior"], bool(step.get("invert"))) in _ISOLATING:
            pattern = step["pattern"]
            found.append(canonical(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])))
        else:
            return None
    return tuple(found)


def describe(step: Mapping[str, Any]) -> str:
    """Return a step in words for a message: its type and its settings."""
    settings = ", ".join(f"{key}={value!r}" for key, value in step.items() if key != "type")
    return f"{step['type']}({settings})"
