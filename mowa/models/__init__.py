"""Neural networks by task: what speeds them up or lets them stream, always on one stock net and reversible.

`ctc_encoder` is for wav2vec2, HuBERT and WavLM, `causal` for language models; `explain` says which implementation each
layer gets, `diff` measures how far apart two models' outputs are.
"""
