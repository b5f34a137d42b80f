"""Fine-tune causal language models with TRL's SFTTrainer.

Start with `trainer`; `dataset` tokenizes and splits, `batches` plans packed batches, `save` writes and verifies.
"""
