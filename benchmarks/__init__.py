"""Benchmarks: each writes `results/NAME.json`, from which `figures` generates the tables of README and docs.

Run them from the repository root as `python -m benchmarks.NAME`; start reading with `record` and `tables`.
"""
