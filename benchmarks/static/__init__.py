"""What the compiler made of every kernel, for GPUs that are not here: `python benchmarks/static_report.py`."""
