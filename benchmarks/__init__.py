"""Every operator against its floor and its peers, in one run: ``python -m benchmarks``."""
