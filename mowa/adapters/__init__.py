"""Make a net learn in part: what is frozen, what is added, how that is kept beside its base, and merged into it."""
