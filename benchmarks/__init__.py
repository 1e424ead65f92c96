"""Measurements on this machine; `make bench` runs them, results are appended to benchmarks/results/*.jsonl."""
