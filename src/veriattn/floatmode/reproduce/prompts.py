"""Tokens of a text under the model's own tokenizer."""

from __future__ import annotations

from veriattn.errors import UsageError
from veriattn.floatmode.engine import FloatModel, codec_of


def token_ids(model: FloatModel, text: str, least: int) -> list[int]:
    """Raises: UsageError where the text is shorter than `least` tokens."""
    ids = codec_of(model.source).encode(text)
    if len(ids) < least:
        raise UsageError(f"the text has {len(ids)} tokens, {least} are needed", hint="--text FILE")
    return ids
