"""Adapters: freeze parts of a net, add LoRA or bottleneck layers, save them beside their base and merge them into it.

Start with `freeze` (`set_trainable`) and `checkpoint` (`save_adapter`, `load_adapter`). `lora` and `bottleneck` add
layers to a net, `head` resizes a CTC head, `merge` merges an adapter into a CTC model; `causal` does the same for
language models.
"""
