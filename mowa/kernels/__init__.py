"""Numerical kernels: functions of tensors with hand-written forward and backward passes, independent of models.

Each module begins with its formula. Start with `attention.dispatch` (attention for packed, padded and windowed
sequences) and `linear_cross_entropy` (a language model's head and loss without its logits). `rms_norm`, `glu`,
`lora_linear` and `tiled_mlp` replace parts of a decoder layer, `offload` keeps checkpointed activations in host memory,
`dropout` and `prepacked_linear` are for CPUs, `quant` holds quantized weights.
"""
