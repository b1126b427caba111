"""Measurements of effpass and the strongest installable peer, in the same run: ``python -m benchmarks AREA``."""
