"""Triton kernels; imported only where Triton is installed. Each has its naive twin in ``kernels/naive.py``."""
