"""Triton kernels; imported only where Triton is installed. Twins: ``kernels/naive.py``, ``kernels/naive_scores.py``."""
