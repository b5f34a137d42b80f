"""Ways to run a CTC encoder: a plan for CPUs, packed batches, chunked and streaming attention.

Start with `cpu_plan` (inference on CPUs) or `packing` (training without padding); `chunk_mask` and `streaming` are the
same chunked computation at once and step by step, `positions` replaces positional convolutions by a table,
`fast_training` speeds up backward passes on CPUs.
"""
