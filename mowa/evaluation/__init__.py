"""What a model is worth on a machine: how it hears, how far it is from another, how fast it is and what it needs."""
