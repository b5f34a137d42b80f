"""Read conversations and texts for language models, render them with the chat template, tokenize and check them.

Start with `conversations` (rows of any usual format → `Conversation`), then `render` (text and the spans written by the
assistant) and `tokenize` (token ids and the loss mask). `files` reads rows, `checks` reports likely mistakes.
"""
