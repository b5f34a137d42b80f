"""Attention for packed, padded and windowed sequences, by the fastest backend that supports the case.

Start with `dispatch` (`AttentionMask`, `attend`); `rules` says which backend is chosen and why, `blocks` computes on any
device, `cuda` calls FlashAttention and FlexAttention, `encoder` is for full attention on CPUs, `varlen` describes packed
sequences.
"""
