"""The command line; the only part that knows click."""

from veriattn.cli.app import main

__all__ = ["main"]
