"""LongBench v1 (2308.14508): 16 English and code sets, 5 Chinese ones, and any local file of the same form.

Prompts say what LongBench's say in other words; metrics, answer caps, chat template use and the middle cut are its own.
The data is not shipped: each set is one JSON-lines file in the data folder's ``longbench``.
"""
