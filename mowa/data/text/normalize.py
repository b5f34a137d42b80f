"""Normalize texts to the form in which they are compared and error rates are computed."""

from __future__ import annotations


def normalize_text(text: str) -> str:
    """Return `text` in lower case, without punctuation, words separated by single spaces."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())
    return " ".join(kept.split())
