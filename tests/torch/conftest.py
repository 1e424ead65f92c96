"""Kernels in tests/torch run on CPU tensors: Triton reads the switch when it is first imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
