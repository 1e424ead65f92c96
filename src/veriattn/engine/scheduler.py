"""Iteration-level batching with chunked prefill: which tokens of which sequences the next step runs."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.sampler import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Sequence:
    """One request's tokens. `computed` counts those whose keys and values are in the cache, or will be after the steps that
    have been handed out. `owner`: whose it is."""

    seq_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    choice: int = 0
    owner: str = ""
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def reserved_tokens(self) -> int:
        """The most cache entries that it can come to need."""
        return len(self.prompt_ids) + self.max_tokens

    def tokens(self, start: int, count: int) -> tuple[int, ...]:
        """Ids at positions start .. start + count - 1 of prompt and output."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return tuple(self.output_ids[start - prompt : start - prompt + count])
        return (*self.prompt_ids[start : start + count], *self.output_ids[: max(0, start + count - prompt)])


class Scheduler:
    """Every running sequence that is decoding gets its token each step; what is left of the step's budget goes to prompts, in
    order of arrival, in chunks.

    Admission: the owner with the fewest running sequences has the next turn, with its oldest request; among equals who has
    waited longest for a turn. Who has it keeps it until there is room, so that small requests do not starve a large one.

    Bounds: at most max_tokens_per_step tokens and max_sequences sequences a step; the reserved tokens of admitted
    sequences stay within kv_tokens.
    """

    def __init__(self, max_tokens_per_step: int, max_sequences: int, kv_tokens: int) -> None:
        self._budget, self._max_sequences, self._kv_tokens = max_tokens_per_step, max_sequences, kv_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._turn: Sequence | None = None
        self._turns = 0
        self._last_turn: dict[str, int] = {}

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait for admission."""
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> bool:
        """Take a sequence out; True if it had been admitted (so that its cache entries must be freed)."""
        if seq in self.running:
            self.running.remove(seq)
            return True
        self.waiting.remove(seq)
        if self._turn is seq:
            self._turn = None
        return False

    def requeue_all(self) -> None:
        """The caches are gone: every sequence starts over from its (checked) tokens."""
        for seq in self.running:
            seq.computed = 0

    def fits(self, seq: Sequence) -> bool:
        """Whether the sequence can ever be admitted."""
        return seq.reserved_tokens <= self._kv_tokens

    def next_batch(self) -> Batch | None:
        """The next step, or None if there is nothing to run. It counts as computed from now on: the step after it can be
        asked for before it has run, and has no part in what waits for a sample. `requeue_all` where it could not be run.
        """
        self._admit()
        budget, entries = self._budget, []
        decoding = [s for s in self.running if s.num_tokens - s.computed == 1]
        prefilling = [s for s in self.running if s.num_tokens - s.computed > 1]
        for seq in decoding + prefilling:
            n = min(budget, seq.num_tokens - seq.computed)
            if n == 0:
                break
            last = seq.computed + n == seq.num_tokens
            tokens = seq.tokens(seq.computed, n)
            entries.append(BatchEntry(seq.seq_id, seq.computed, tokens, "last" if last else "none"))
            seq.computed += n
            budget -= n
        if len(entries) < len(decoding):
            # Those who got their token go to the end, so that a budget smaller than the batch starves nobody.
            served = {e.seq_id for e in entries}
            self.running.sort(key=lambda s: s.seq_id in served)
        return Batch(tuple(entries)) if entries else None

    def _admit(self) -> None:
        reserved = sum(s.reserved_tokens for s in self.running)
        held = Counter(s.owner for s in self.running)
        while self.waiting and len(self.running) < self._max_sequences:
            seq = self._turn or min(self.waiting, key=lambda s: (held[s.owner], self._last_turn.get(s.owner, 0)))
            reserved += seq.reserved_tokens
            if reserved > self._kv_tokens:
                self._turn = seq
                return
            self._turn = None
            self.waiting.remove(seq)
            self.running.append(seq)
            held[seq.owner] += 1
            self._turns += 1
            self._last_turn[seq.owner] = self._turns
