"""Recipes: what a training run does, as dataclasses that YAML, flags and docs are generated from.

Start with `ctc` and `causal`; `schema` reads and checks any such dataclass, `dispatch` picks the recipe by its task.
"""
