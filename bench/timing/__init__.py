"""Rounds, checks against float64, rooflines and traces."""
