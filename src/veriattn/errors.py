"""The one tree of errors: each has a stable code, an exit code and, where one helps, a hint.

Peer misbehaviour (`ProverFault` and below) is kept apart from misuse (`UsageError`, `ConfigError`),
bad files (`ModelError`) and our own bugs (`InternalError`). Messages name the layer, operation and
position where something went wrong; they never contain secrets (challenges, keys) or prompt text.
"""

from __future__ import annotations

from collections.abc import Collection

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_VERIFICATION = 3
EXIT_PROVER = 4
EXIT_MODEL = 5
EXIT_INTERRUPTED = 130


class VeriattnError(Exception):
    """Base of all errors that this package raises on purpose.

    `code` is stable and machine-readable, `exit_code` is the command line's, `hint` tells the reader what to do.
    """

    code = "error"
    exit_code = EXIT_INTERNAL

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(VeriattnError):
    """The caller asked for something that cannot be done."""

    code = "usage"
    exit_code = EXIT_USAGE


class ConfigError(VeriattnError):
    """A setting is out of its range or contradicts another."""

    code = "config"
    exit_code = EXIT_USAGE


class ModelError(VeriattnError):
    """A model or input file is missing, damaged, unsupported or not the one that was pinned."""

    code = "model"
    exit_code = EXIT_MODEL


class NumericsError(ModelError):
    """An activation left the range that the canonical function is defined on (non-finite or too large)."""

    code = "numerics"


class ProverFault(VeriattnError):
    """The prover did not do what the protocol asks of it. The session is over."""

    code = "prover_fault"
    exit_code = EXIT_PROVER


class ProverUnavailable(ProverFault):
    """The prover could not be started, or died, or closed its link."""

    code = "prover_unavailable"


class ProverTimeout(ProverFault):
    """The prover did not answer in time."""

    code = "prover_timeout"


class MalformedMessage(ProverFault):
    """A message from the prover breaks the wire format."""

    code = "malformed_message"
    exit_code = EXIT_VERIFICATION


class VerificationError(ProverFault):
    """A claim of the prover is wrong. Nothing that depends on it is released.

    rows: wrong rows of a linear's claim, `operation` its name. sequences: ids of sequences whose claims are wrong. Both only
    as far as they are known: a check stops at the first claim that is wrong, so others of the step may be wrong too.
    """

    code = "verification"
    exit_code = EXIT_VERIFICATION

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        operation: str = "",
        rows: Collection[int] = (),
        sequences: Collection[int] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.operation, self.rows, self.sequences = operation, tuple(rows), frozenset(sequences)


class FreivaldsMismatch(VerificationError):
    """A claimed matrix product is not the product of the verifier's own operands."""

    code = "freivalds_mismatch"


class AttentionMismatch(VerificationError):
    """A claimed attention score or output does not follow from the verified queries, keys and values."""

    code = "attention_mismatch"


class TranscriptMismatch(VerificationError):
    """A well-formed message is not the one that the protocol expects at this place."""

    code = "transcript_mismatch"


class AttestationError(VeriattnError):
    """A quote, receipt or key binding does not check out."""

    code = "attestation"
    exit_code = EXIT_VERIFICATION


class AttestationUnavailable(AttestationError):
    """The machine's TEE did not give a quote, or there is none."""

    code = "attestation_unavailable"


class AttestationBusy(AttestationUnavailable):
    """Quotes are asked for faster than they are made; `retry_after_s` says when to come back."""

    code = "attestation_rate_limited"

    def __init__(self, message: str, retry_after_s: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class ReceiptNotFound(VeriattnError):
    """There is no such receipt for this caller; another caller's looks the same."""

    code = "receipt_not_found"
    exit_code = EXIT_USAGE


class MachineError(VeriattnError):
    """The operating system refused something that nothing more precise was said about: room, memory, permission."""

    code = "system"


class InternalError(VeriattnError):
    """A bug on our side; never the prover's doing."""

    code = "internal"
    exit_code = EXIT_INTERNAL
