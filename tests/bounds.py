"""What "the same" means: fastris/bench/bounds.py, which the benchmarks hold every arm to as well."""

from fastris.bench.bounds import EPS, assert_path_same, assert_same, rms, run_with_gradients

__all__ = ["EPS", "assert_path_same", "assert_same", "rms", "run_with_gradients"]
