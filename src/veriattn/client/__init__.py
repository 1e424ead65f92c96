"""The client's side: fetching and checking receipts, replaying answers, and a thin wrapper around the OpenAI SDK."""

from veriattn.client.bundle import Bundle
from veriattn.client.sdk import Exchange, VerifiedOpenAI

__all__ = ["Bundle", "Exchange", "VerifiedOpenAI"]
