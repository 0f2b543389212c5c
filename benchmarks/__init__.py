"""Benchmarks of fastvit against its peers, imported as `fastvit.benchmarks`."""
