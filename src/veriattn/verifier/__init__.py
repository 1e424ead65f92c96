"""The trusted side: secrets, checks, replay, KV bookkeeping, release."""
