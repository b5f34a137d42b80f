"""The verbs of mowa as typed functions, one file per group. `mowa/__init__.py` lists them.

Start with `models` (`mowa.load`); each function is a few lines over the packages below.
"""
