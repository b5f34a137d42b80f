"""Faster training and inference of causal language models: attention, norms, MLPs, LoRA and loss replaced on one net.

Start with `accelerate` (`accelerate`, `restore`), which calls the others: `attention_interface`, `fused_modules` and
`fused_loss`.
"""
