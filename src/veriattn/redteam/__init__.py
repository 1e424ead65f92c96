"""Lying provers and tampering campaigns."""
