"""The version, which the package, results and model cards state."""

__version__ = "0.1.0"
