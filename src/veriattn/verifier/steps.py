"""Steps as the prover is told of them: cut where a sequence outgrows it, each with its attention check, some ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.choice import AutoCheck
from veriattn.wire.channel import Channel
from veriattn.wire.messages import AttentionCheck, Kind, LogitRows, Mode, Step, StepEntry, encode_step, step_bytes

_LOGIT_ROWS = {"none": LogitRows.NONE, "last": LogitRows.LAST, "all": LogitRows.ALL}

#: A STEP of up to so many bytes may lie on the link while the prover is busy sending: a ring of the usual size has
#: room for many, the buffers of a socket for one. A larger one might leave both sides waiting for the other to take something.
AHEAD_BYTES = 1 << 15


def cut_at_limits(batch: Batch, limits: Mapping[int, int]) -> list[Batch]:
    """Cut runs that lie on both sides of their sequence's limit, so that each part lies on one."""
    first, second = [], []
    for e in batch.entries:
        cut = limits.get(e.seq_id, 0) - e.start
        if 0 < cut < e.num_tokens:
            first.append(BatchEntry(e.seq_id, e.start, e.token_ids[:cut], "all" if e.logits == "all" else "none"))
            second.append(BatchEntry(e.seq_id, e.start + cut, e.token_ids[cut:], e.logits))
        else:
            first.append(e)
    return [Batch(tuple(part)) for part in (first, second) if part]


def _fits(batch: Batch) -> bool:
    """Whether its STEP may lie on the link."""
    return step_bytes(len(batch.entries), batch.num_tokens) <= AHEAD_BYTES


class Choosable(Protocol):
    """Operations whose attention check may change between steps."""

    attention_check: AttentionCheck
    attention_s: float


@dataclass
class AutoSwitch:
    """A chooser of the attention check, and the operations that it chooses for."""

    chooser: AutoCheck
    ops: Choosable
    _before_s: float = 0.0

    def begin(self, check: AttentionCheck) -> None:
        """A step that was told to use this check is about to be replayed."""
        self.ops.attention_check, self._before_s = check, self.ops.attention_s

    def end(self, batch: Batch) -> None:
        """It has been."""
        self.chooser.took(batch, self.ops.attention_check, self.ops.attention_s - self._before_s)


@dataclass(frozen=True)
class Part:
    """A step of the prover. shared: whether attention of some of its sequences is shared with it."""

    batch: Batch
    check: AttentionCheck
    shared: bool


@dataclass
class Begun:
    """A batch under way: the steps that it is cut into, and how many of them the prover knows of."""

    batch: Batch
    parts: tuple[Part, ...]
    told: int = 0


class Steps:
    """Tells the prover what to run (docs/wire.md section 5), where it runs whole steps; counts them."""

    def __init__(self, channel: Channel, mode: Mode, check: AttentionCheck | Literal["auto"]) -> None:
        self._channel, self._mode = channel, mode
        self._check = AttentionCheck.REPLAY if check == "auto" else check
        self._sent = 0
        #: Set where the check is chosen step by step.
        self.auto: AutoSwitch | None = None

    def begin(self, batch: Batch, limits: Mapping[int, int]) -> Begun:
        """Cut a batch at its sequences' limits and tell the prover. Raises: ProverFault and below."""
        parts = []
        for part in cut_at_limits(batch, limits):
            check = self._check if self.auto is None else self.auto.chooser.next(part)
            shared = any(e.seq_id in limits and e.start >= limits[e.seq_id] for e in part.entries)
            parts.append(Part(part, check, shared))
        begun = Begun(batch, tuple(parts))
        self.reach(begun, 0, limits)
        return begun

    def reach(self, begun: Begun, index: int, limits: Mapping[int, int]) -> None:
        """Tell the prover of a part whose turn has come, and of what may lie on the link while it is at that.

        While attention is shared, it waits for blocks and sums, and can take nothing else. Raises: ProverFault and below.
        """
        if self._mode is Mode.OPERATIONS:
            return
        while begun.told < len(begun.parts):
            part = begun.parts[begun.told]
            early = begun.told > index
            if early and (any(p.shared for p in begun.parts[index : begun.told]) or not _fits(part.batch)):
                return
            self._send(part.batch, part.check, limits)
            begun.told += 1

    def may_precede(self, begun: Begun, following: Batch) -> bool:
        """Whether the prover may be told of another batch while it is at `begun`."""
        shared = any(p.shared for p in begun.parts)
        return self._mode is not Mode.OPERATIONS and _fits(following) and not shared

    def _send(self, batch: Batch, check: AttentionCheck, limits: Mapping[int, int]) -> None:
        step = Step(
            step=self._sent,
            mode=self._mode,
            attention_check=check,
            entries=tuple(
                StepEntry(e.seq_id, e.start, e.num_tokens, _LOGIT_ROWS[e.logits], limits.get(e.seq_id))
                for e in batch.entries
            ),
            token_ids_i32=batch.token_ids(),
        )
        self._channel.send(Kind.STEP, encode_step(step))
        self._sent += 1
