"""One client request on its way through the engine: what is asked, and the events that come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from veriattn.engine.engine import Request, TokenOutput
from veriattn.errors import VeriattnError


@dataclass(frozen=True)
class Evidence:
    """What the session had checked when a token left: rows by kind since its start."""

    checks: dict[str, int]
    soundness_bits: int | None


@dataclass(frozen=True)
class TokenEvent:
    """A released token of one choice. lag_s: what checking added to its step."""

    choice: int
    output: TokenOutput
    lag_s: float
    evidence: Evidence


@dataclass(frozen=True)
class FailedEvent:
    """The job ends here, without the rest of its tokens."""

    error: VeriattnError


Event = TokenEvent | FailedEvent


@dataclass(eq=False)
class Job:
    """Requests that belong to one HTTP request (one for each choice), and the queue that its handler reads.

    Fields below `events` belong to the engine's thread. lie_after: with the demo's switch, how many tokens are let through
    before a claim of the prover is altered.
    """

    requests: Sequence[Request]
    loop: asyncio.AbstractEventLoop
    lie_after: int | None = None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    choice_of: dict[int, int] = field(default_factory=dict)
    open_choices: int = 0
    retries: int = 0
    released: int = 0
    first_token: float | None = None
    last_token: dict[int, float] = field(default_factory=dict)

    @property
    def reserved_tokens(self) -> int:
        """The most cache entries that it can come to need."""
        return sum(len(r.prompt_ids) + r.max_tokens for r in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Of all distinct prompts: choices of one prompt count it once."""
        return sum(len(r.prompt_ids) for r in self.requests if r.choice == 0)
