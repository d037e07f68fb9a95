"""Benchmarks: operators and a whole distillation step against plain PyTorch. ``make bench``, ``make inspect``."""
