"""veriattn: verifiable LLM inference with exact integer numerics."""

__version__ = "0.1.0"
