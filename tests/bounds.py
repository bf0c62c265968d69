"""What "the same" means: fastris/fastris/testing.py, which the benchmarks hold every arm to as well."""

from fastris.testing import EPS, EXACT, FLOAT32_TABLES, assert_path_same, assert_same, rms, run_with_gradients

__all__ = ["EPS", "EXACT", "FLOAT32_TABLES", "assert_path_same", "assert_same", "rms", "run_with_gradients"]
