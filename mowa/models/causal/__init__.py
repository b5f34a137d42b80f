"""Faster causal language models: fused modules and attention swapped into one net, and out again.

Start with `accelerate`, which calls the others: `attention_interface`, `fused_modules`, `fused_loss`.
"""
