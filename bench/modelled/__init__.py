"""A model of cards that nobody has measured."""
