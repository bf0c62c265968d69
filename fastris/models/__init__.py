"""Models: one package per system, their common base class (base.py) and the registry of their names."""
