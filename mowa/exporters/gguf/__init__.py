"""Export language models to GGUF, the format of llama.cpp, Ollama and LM Studio.

Start with `tokenizer`, which turns a transformers tokenizer into metadata, and `gguf_tokenizer`, which tokenizes from
that metadata alone as llama.cpp does. `token_ids` compares the two and is why an export can be trusted.
"""
