"""Files and the Hugging Face Hub: resolve model names, and read and write what belongs to a checkpoint.

Start with `hub` (`resolve_model`). `weights` finds and converts weight files, `processor` reads and writes vocabulary
and audio settings, `manifest` checks `mowa.json`, `hashing` computes checksums, `atomic` writes files and folders.
"""
