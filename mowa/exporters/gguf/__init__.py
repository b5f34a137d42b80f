"""Export language models to GGUF, the format of llama.cpp, Ollama and LM Studio.

`tokenizer` turns a tokenizer of transformers into metadata and proves by token ids that llama.cpp reads it as the same
one. `chat_template` checks what other programs refuse in a chat template.
"""
