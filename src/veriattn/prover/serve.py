"""The prover's main loop: HELLO, then steps until the verifier is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.errors import InternalError, ModelError, ProverUnavailable, VeriattnError
from veriattn.native.kernels import wipe_free_memory
from veriattn.prover.backend import Backend, ClaimSink, GroupSink, StartPiece
from veriattn.prover.cpu import CpuBackend
from veriattn.prover.finder import ModelFinder
from veriattn.prover.split import SplitProver, SplitStep
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.trace import TRACE_VARIABLE, FileTrace
from veriattn.wire.channel import Channel
from veriattn.wire.messages import (
    BadRequest,
    ErrorCode,
    Hello,
    Kind,
    LogitRows,
    Mode,
    Ready,
    Step,
    VerifierGone,
    decode_free,
    decode_hello,
    decode_step,
    encode_error,
    encode_ready,
)
from veriattn.wire.operations import decode_attend, decode_linear, decode_load, decode_weights, max_request_bytes
from veriattn.wire.split import decode_split

_LOGIT_ROWS = {LogitRows.NONE: "none", LogitRows.LAST: "last", LogitRows.ALL: "all"}

#: A connection that says nothing does not keep a listening prover from others for longer than this.
FIRST_MESSAGE_S = 60.0

BackendFactory = Callable[[Hello], Backend]


class ChannelSink:
    """Claims as messages."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self._channel.trace.label = name
        self._channel.send(Kind.CLAIM, values)


class LayerSink(ChannelSink, GroupSink):
    """Claims as messages, those of a whole layer together where they are known together (`GroupSink`)."""

    @property
    def memory(self) -> memoryview | None:
        """The ring that claims go through; None over a socket."""
        return self._channel.outgoing_memory

    def claim_group(self, name: str, claims: Sequence[np.ndarray[Any, Any]]) -> None:
        """See `GroupSink.claim_group`."""
        self._channel.trace.label = name
        self._channel.send_all(Kind.CLAIM, claims)

    def claim_pieces(self, name: str, sizes: Sequence[int], start: StartPiece) -> None:
        """See `GroupSink.claim_pieces`."""
        self._channel.trace.label = name
        self._channel.send_pieces(Kind.CLAIM, sizes, start)


def model_directory(hello: Hello, finder: ModelFinder | None) -> Path:
    """Where the model is. With a finder its digest alone says which one it is. Raises: ModelError."""
    if finder is not None:
        return finder.find(hello.model_digest)
    if not hello.model_path:
        raise ModelError("the verifier names a model by digest, this prover knows no directories to look in")
    return Path(hello.model_path)


def cpu_backend(hello: Hello, finder: ModelFinder | None = None) -> Backend:
    """The default factory. Raises: ModelError."""
    return CpuBackend(
        model_directory(hello, finder),
        expected_digest=hello.model_digest,
        kv_tokens=hello.limits.kv_tokens,
        max_sequences=hello.limits.max_sequences,
    )


def batch_of(step: Step) -> Batch:
    """A STEP message as a batch."""
    entries, at = [], 0
    for e in step.entries:
        ids = tuple(step.token_ids_i32[at : at + e.num_tokens].tolist())
        entries.append(BatchEntry(e.seq_id, e.start, ids, _LOGIT_ROWS[e.logits]))  # type: ignore[arg-type]
        at += e.num_tokens
    return Batch(tuple(entries))


def serve(
    channel: Channel,
    make_backend: BackendFactory = cpu_backend,
    make_sink: Callable[[Channel], ClaimSink] | None = None,
    first_message_s: float | None = None,
    wipe: Callable[[], None] = wipe_free_memory,
) -> None:
    """Answer the verifier until SHUTDOWN or the end of the link. Faults of our own are reported in an ERROR message.

    first_message_s: how long to wait for HELLO; without end by default, since a parent process reads the weights first.
    wipe: overwrites what this process no longer uses, when sequences have ended.
    """
    try:
        _, payload = channel.recv_any(None, first_message_s)
        hello = decode_hello(payload)
        if hello.spec != SPEC_VERSION:
            raise BadRequest(f"this prover implements spec version {SPEC_VERSION}")
        backend = make_backend(hello)
        channel.send(Kind.READY, encode_ready(Ready(os.getpid(), hello.protocol, SPEC_VERSION, backend.device)))
        limits, config = hello.limits, backend.config
        operation_bytes = max_request_bytes(config, limits) if hello.mode is Mode.OPERATIONS else 0
        shares = SplitProver(channel, config, limits)
        trace = FileTrace(os.environ[TRACE_VARIABLE]) if TRACE_VARIABLE in os.environ else None
        if trace is not None:
            channel.set_trace(trace)
        sink = make_sink(channel) if make_sink else LayerSink(channel)
        while True:
            if not channel.pending:
                backend.finish()
            if trace is not None:
                trace.flush()
            kind, payload = channel.recv_any(limits, operation_bytes=operation_bytes)
            if kind is Kind.SHUTDOWN:
                return
            if kind is Kind.FREE:
                for seq_id in decode_free(payload, limits):
                    backend.free(seq_id)
                # Nothing of an earlier message is referred to by now: what it left is in free memory.
                channel.wipe()
                wipe()
            elif hello.mode is Mode.OPERATIONS and kind is Kind.LINEAR:
                backend.linear(decode_linear(payload, config, limits), sink)
            elif hello.mode is Mode.OPERATIONS and kind is Kind.ATTEND:
                backend.attend(decode_attend(payload, config, limits), sink)
            elif hello.mode is Mode.OPERATIONS and kind is Kind.WEIGHTS:
                backend.weights(decode_weights(payload, config, limits), sink)
            elif hello.mode is Mode.OPERATIONS and kind is Kind.LOAD:
                backend.load_rows(decode_load(payload, config))
            elif hello.mode is Mode.OPERATIONS and kind is Kind.SPLIT:
                backend.split(decode_split(payload, config, limits), sink, shares)
            elif hello.mode is not Mode.OPERATIONS and kind is Kind.STEP:
                _run_step(channel, backend, sink, shares, decode_step(payload, limits))
            else:
                raise BadRequest(f"{kind.name} is not expected here")
    except VerifierGone:
        return
    except BadRequest as e:
        _report(channel, ErrorCode.BAD_REQUEST, e)
    except ModelError as e:
        _report(channel, ErrorCode.MODEL, e)
    except MemoryError as e:
        _report(channel, ErrorCode.OUT_OF_MEMORY, e)
    except ProverUnavailable as e:
        # What is missing here: the hint goes where people look for the reason.
        print(f"hint: {e.hint}", file=sys.stderr, flush=True)
        _report(channel, ErrorCode.UNSUPPORTED, e)
    except InternalError as e:
        _report(channel, ErrorCode.INTERNAL, e)


def _run_step(channel: Channel, backend: Backend, sink: ClaimSink, shares: SplitProver, step: Step) -> None:
    claims = sink if step.mode is Mode.CLAIMS else None
    shared = frozenset(e.seq_id for e in step.entries if e.split)
    batch, check = batch_of(step), step.attention_check
    split = (SplitStep(shared, shares),) if shared else ()
    logits = backend.step(batch, check, claims, *split)
    if step.mode is Mode.LOGITS and logits.size:
        channel.send(Kind.LOGITS, logits)


def _report(channel: Channel, code: ErrorCode, error: Exception) -> None:
    try:
        channel.send(Kind.ERROR, encode_error(code, str(error)))
    except VeriattnError:
        return
