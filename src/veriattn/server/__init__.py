"""OpenAI-compatible HTTP server over the engine: requests, batching thread, faults, keys, metrics, a page."""
