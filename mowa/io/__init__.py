"""Files and the Hugging Face Hub: resolve model names, read and write checkpoints atomically.

Start with `hub` (`resolve_model`); `weights` finds and converts weight files, `atomic` writes files and folders whole or
not at all, `hashing` fingerprints them, `processor` writes tokenizer and feature-extractor files.
"""
