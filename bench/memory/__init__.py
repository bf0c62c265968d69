"""Bytes: what a forward pass keeps, what a whole step needs. ``python -m bench.memory`` counts and times the whole."""
