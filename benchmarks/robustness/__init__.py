"""The robustness table: presets × attacks × seeds × data, one row each: ``python -m benchmarks.robustness``."""
