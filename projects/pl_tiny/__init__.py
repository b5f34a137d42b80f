"""Build pl-tiny, the bundled Polish model.

This program uses the mowa package and is not part of it. `README.md` explains the method; start reading in `cli`.
"""
