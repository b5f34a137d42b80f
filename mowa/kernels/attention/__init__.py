"""Attention for packed, padded and windowed sequences, by the fastest backend that supports the case.

Start with `dispatch` (`AttentionMask`, `attend`). `rules` selects the backend and says why; `blocks` computes on any
device; `cuda` calls FlashAttention and FlexAttention; `encoder` is full attention on CPUs; `varlen` describes packed
sequences.
"""
