"""Slow, obvious oracles that share no code with the package."""
