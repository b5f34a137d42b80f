"""Changes to a stock net for faster computation or streaming, by task; they affect one net only and are reversible.

`ctc_encoder` is for wav2vec2, HuBERT and WavLM, `causal` for language models; `explain` says which implementation each
layer gets, `diff` measures the difference of two models' outputs.
"""
