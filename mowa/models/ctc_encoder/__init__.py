"""Strategies for running wav2vec2-like CTC encoders: a plan for CPUs, packed batches, chunked and streaming attention.

Start with `anatomy`, which names the parts of a net and their order; only this package calls them. `cpu_plan`
(inference on CPUs) and `packing` (training without padding) are strategies over it. `chunk_mask` and `streaming` are
the same chunked computation, all at once and chunk by chunk; `geometry` reads sizes from a config; `positions` handles
nets with absolute positions; `fast_training` speeds up backward passes on CPUs.
"""
