"""Quantize weight matrices to int8, int4 and nf4, and compute with them.

Start with `weights` (`QuantizedWeight`, `quantize`), then `linear` (`QuantizedLinear`). `gptq` and `nf4` quantize in
other ways, `int4_layout` packs four-bit values as other libraries store them.
"""
