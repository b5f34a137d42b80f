"""Recipes: a training run as one frozen dataclass, from which YAML, CLI flags and the reference page are generated.

Start with `ctc` and `causal`; `shared` holds the sections that both have, `schema` reads and checks any such dataclass,
and `dispatch` selects the recipe class by `task`.
"""
