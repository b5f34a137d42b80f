"""Conversations and texts for language models: read, rendered with the chat template, tokenized, checked.

Start with `conversations` (rows of any usual shape → `Conversation`), then `template` (which characters the assistant
writes) and `tokenize` (token ids and the loss mask). `files` reads the rows, `checks` lists what looks wrong.
"""
