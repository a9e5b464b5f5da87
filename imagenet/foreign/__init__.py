"""Weights and statistics that others published, read without executing anything. Imported by convert.py and metrics."""
