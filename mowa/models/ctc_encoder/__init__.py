"""Strategies for running wav2vec2-like CTC encoders: a plan for CPUs, packed batches, chunked and streaming attention.

Start with `cpu_plan` (inference on CPUs) or `packing` (training without padding). `chunk_mask` and `streaming` are the
same chunked computation, all at once and chunk by chunk; `geometry` converts between samples and frames; `positions`
handles nets with absolute positions; `fast_training` speeds up backward passes on CPUs.
"""
