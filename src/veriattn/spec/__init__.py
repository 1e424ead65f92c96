"""Canonical integer function: the specification in NumPy, shared by both sides."""
