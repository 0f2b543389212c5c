"""With this folder on PYTHONPATH, every Python process finds the stand-in for a GPU (see stub_gpu.py)."""

import stub_gpu

stub_gpu.install()
