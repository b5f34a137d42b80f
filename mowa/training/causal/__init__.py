"""Fine-tune causal language models with TRL's SFTTrainer.

Start with `trainer`, which calls `setup` (net, data, batches), trains, and calls `save`. `dataset` tokenizes and
splits, `batches` plans packed batches.
"""
