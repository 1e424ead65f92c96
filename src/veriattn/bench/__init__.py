"""Measurements on this machine: kernels against its own limits, and whole runs against the baselines."""
