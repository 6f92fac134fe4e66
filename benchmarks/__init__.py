"""Benchmarks, each run as `python -m benchmarks.<name>`; figures are kept in results/<machine>/."""
