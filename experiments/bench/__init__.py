"""Benchmarks, ours against the original PyTorch modules: `python -m experiments.bench`."""
