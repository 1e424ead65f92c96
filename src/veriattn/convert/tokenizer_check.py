"""Check a `tokenizers` JSON against the vocabulary that the model has."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from veriattn.errors import ModelError


def check_tokenizer_json(text: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that `text` describes.

    Raises: ModelError if it does not load, or has an id at or above `vocab_size`, or gives an added token another id
    than the one written down (the library renumbers silently where ids contradict each other).
    """
    try:
        described = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"the tokenizer is not JSON: {error.msg}") from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the extension raises the bare class; nothing narrower exists
        if type(error) not in (Exception, ValueError):
            raise
        raise ModelError(f"the tokenizer does not load: {str(error)[:200]}") from error
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if not vocab:
        raise ModelError("the tokenizer has no tokens")
    if (largest := max(vocab.values())) >= vocab_size:
        raise ModelError(f"the tokenizer has token id {largest}, the model has {vocab_size} embeddings")
    for token in described.get("added_tokens", []):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise ModelError(f"the tokenizer gives the added token {token['content']!r} two different ids")
    return tokenizer
