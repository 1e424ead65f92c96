"""Scheduler, strategies and sampling over the verifier."""
