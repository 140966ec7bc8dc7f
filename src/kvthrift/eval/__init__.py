"""Measuring methods honestly against each other: tasks, metrics, one pipeline for every arm.

Uses models through :mod:`kvthrift.integrations.transformers`; knows nothing of how any method works.
"""
