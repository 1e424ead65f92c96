"""The receipt: what it says, how it is signed, and how an untrusted one is taken apart (docs/receipts.md)."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veriattn.attest.canonical import Json, canonical, decimal_text, digest_of, plain, sha256_text
from veriattn.attest.keys import DIGEST_PATTERN, NONCE_PATTERN, SigningKey
from veriattn.errors import AttestationError
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.sampler import SamplingParams

API_VERSION = "aci/1"
SCHEMA_VERSION = 1
PROTOCOL = "veriattn/1"
EVENT_TYPE = "gpu.verified"

#: The request header that carries the client's nonce, 64 lowercase hexadecimal digits; the receipt repeats it.
NONCE_HEADER = "X-ACI-Nonce"
VERSION_HEADER = "X-ACI-Version"
KEYSET_HEADER = "X-ACI-Keyset-Digest"
RECEIPT_HEADER = "X-Receipt-Id"

#: What no event of this version claims. A receipt lists it, so that silence is never read as a check.
NOT_VERIFIED = (
    "confidentiality of prompt and answer towards the prover",
    "logprobs: computed in the TEE from verified logits, not part of the canonical function",
    "quality of the model and its relation to the float checkpoint",
    "side channels and physical attacks on the TEE",
    "tokenizer and chat template beyond their hashes in the model digest",
    "who sent the request",
)

RESULTS = {
    "exact": "verified",
    "trusted-compute": "trusted-compute",
    "tolerance": "tolerance",
    "none": "unverified",
}


def ids_digest(ids: Sequence[int]) -> str:
    """Digest of token ids: SHA-256 of `veriattn/token-ids/1`, their count as little-endian u64, each as u32."""
    return sha256_text(b"veriattn/token-ids/1" + struct.pack(f"<Q{len(ids)}I", len(ids), *ids))


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of an effective configuration; numbers as in `plain`, nothing secret in it."""
    return digest_of(plain(dict(config)))


def sampling_json(params: SamplingParams, max_tokens: int, *, ignore_eos: bool = False) -> Json:
    """Everything that the canonical sampler reads, binary64 values as decimal text, the seed as text of its u64."""
    return {
        "temperature": decimal_text(params.temperature),
        "top_k": params.top_k,
        "top_p": decimal_text(params.top_p),
        "min_p": decimal_text(params.min_p),
        "repetition_penalty": decimal_text(params.repetition_penalty),
        "presence_penalty": decimal_text(params.presence_penalty),
        "frequency_penalty": decimal_text(params.frequency_penalty),
        "logit_bias": [[i, decimal_text(b)] for i, b in params.logit_bias],
        "seed": str(params.seed % 2**64),
        "max_tokens": max_tokens,
        "ignore_eos": ignore_eos,
    }


def choice_json(
    index: int, output_ids: Sequence[int], finish_reason: str, *, prompt: int = 0, choice: int | None = None
) -> Json:
    """One answer. `index` is its place in the response, `prompt` that of its prompt in the request, `choice` the number
    among the answers to one prompt, which the sampler's random numbers depend on (left out: the same as `index`)."""
    return {
        "index": index,
        "prompt": prompt,
        "choice": index if choice is None else choice,
        "output_tokens": len(output_ids),
        "output_ids_sha256": ids_digest(output_ids),
        "finish_reason": finish_reason,
    }


def verification_event(
    *,
    model_digest: str,
    strategy: str,
    guarantee: str,
    checks: Mapping[str, int],
    soundness_bits: int | None,
    prompts: Sequence[Sequence[int]],
    choices: Iterable[Json],
    sampling: Json,
    config: Mapping[str, Any],
    client_nonce: str | None,
    not_verified: Sequence[str] = (),
) -> Json:
    """The `gpu.verified` event of one response.

    model_digest: hex as in the manifest. guarantee: the strategy's (`exact`, `trusted-compute`, `tolerance`, `none`).
    checks: counts since the session's start. soundness_bits: None where nothing is outsourced. choices: `choice_json`.
    sampling: `sampling_json`. config: the effective configuration, of which only the digest goes in. client_nonce: as
    the request's header had it, or None. prompts: token ids of each prompt (chat has one). Ids of prompts and answers
    are those that the engine ran, with special tokens.
    """
    return {
        "type": EVENT_TYPE,
        "schema_version": SCHEMA_VERSION,
        "result": RESULTS.get(guarantee, "unverified"),
        "protocol": PROTOCOL,
        "spec_version": SPEC_VERSION,
        "model_digest": model_digest,
        "strategy": strategy,
        "guarantee": guarantee,
        "checks": {k: int(v) for k, v in checks.items()},
        "soundness_bits": 0 if soundness_bits is None else soundness_bits,
        "failures": 0,
        "prompts": [{"prompt_tokens": len(p), "prompt_ids_sha256": ids_digest(p)} for p in prompts],
        "choices": list(choices),
        "sampling": sampling,
        "config_digest": config_digest(config),
        "client_nonce": client_nonce or "",
        "not_verified": [*NOT_VERIFIED, *not_verified],
    }


def build(
    *,
    key: SigningKey,
    keyset_digest: str,
    receipt_id: str,
    chat_id: str,
    model: str,
    endpoint: str,
    served_at: int,
    request_sha256: str,
    response_sha256: str,
    event: Json,
) -> Json:
    """A signed receipt. Raises: AttestationError for a value that canonical JSON cannot hold."""
    document = {
        "api_version": API_VERSION,
        "receipt_id": receipt_id,
        "chat_id": chat_id,
        "model": model,
        "endpoint": endpoint,
        "method": "POST",
        "served_at": served_at,
        "workload_keyset_digest": keyset_digest,
        "event_log": [
            {"type": "request.received", "body_hash": request_sha256},
            event,
            {"type": "response.returned", "body_hash": response_sha256},
        ],
        "key_id": key.key_id,
    }
    return {**document, "signature": key.sign(canonical(document))}


def signing_input(receipt: Json) -> bytes:
    """The bytes under the signature: everything but the signature itself."""
    return canonical({k: v for k, v in receipt.items() if k != "signature"})


@dataclass(frozen=True)
class ParsedReceipt:
    """An untrusted receipt whose shape is right. Nothing in it is believed before the signature."""

    document: Json
    receipt_id: str
    chat_id: str
    keyset_digest: str
    key_id: str
    signature: str
    served_at: int
    request_sha256: str
    response_sha256: str
    event: Json


_TOP = {
    "api_version", "receipt_id", "chat_id", "model", "endpoint", "method", "served_at",
    "workload_keyset_digest", "event_log", "key_id", "signature",
}  # fmt: skip


_CHOICE = {"index", "prompt", "choice", "output_tokens", "output_ids_sha256", "finish_reason"}


def parse(receipt: Json) -> ParsedReceipt:
    """Take a receipt apart. Raises: AttestationError naming what is missing, unknown or of the wrong type."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise AttestationError(f"receipt: {what}")

    need(set(receipt) == _TOP, f"missing or unknown members: {', '.join(sorted(_TOP ^ set(receipt)))}")
    need(receipt["api_version"] == API_VERSION, f"api_version is not {API_VERSION}")
    for name in ("receipt_id", "chat_id", "model", "endpoint", "method", "key_id", "signature"):
        need(isinstance(receipt[name], str), name)
    need(type(receipt["served_at"]) is int, "served_at")
    need(_matches(DIGEST_PATTERN, receipt["workload_keyset_digest"]), "workload_keyset_digest")
    log = receipt["event_log"]
    need(isinstance(log, list) and all(isinstance(e, dict) for e in log), "event_log")
    types = [e.get("type") for e in log]
    need(types == ["request.received", EVENT_TYPE, "response.returned"], f"its events are {types}")
    request, event, response = log
    for e in (request, response):
        need(set(e) == {"type", "body_hash"} and _matches(DIGEST_PATTERN, e["body_hash"]), f"event {e['type']}")
    _parse_event(event)
    return ParsedReceipt(
        receipt,
        receipt["receipt_id"],
        receipt["chat_id"],
        receipt["workload_keyset_digest"],
        receipt["key_id"],
        receipt["signature"],
        receipt["served_at"],
        request["body_hash"],
        response["body_hash"],
        event,
    )


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _parse_event(event: Json) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise AttestationError(f"receipt: event {EVENT_TYPE}: {what}")

    need(event.get("schema_version") == SCHEMA_VERSION, f"schema_version is not {SCHEMA_VERSION}")
    for name in ("result", "protocol", "strategy", "guarantee", "client_nonce"):
        need(isinstance(event.get(name), str), name)
    for name in ("spec_version", "soundness_bits", "failures"):
        need(type(event.get(name)) is int and event[name] >= 0, name)
    need(_matches(NONCE_PATTERN, event.get("model_digest")), "model_digest")
    need(_matches(DIGEST_PATTERN, event.get("config_digest")), "config_digest")
    for name in ("checks", "sampling"):
        need(isinstance(event.get(name), dict), name)
    need(isinstance(event.get("not_verified"), list) and len(event["not_verified"]) > 0, "not_verified")
    prompts, choices = event.get("prompts"), event.get("choices")
    need(isinstance(prompts, list) and len(prompts) > 0, "prompts")
    for p in prompts or ():
        need(isinstance(p, dict) and set(p) == {"prompt_tokens", "prompt_ids_sha256"}, "a prompt")
        need(_count(p["prompt_tokens"]) and _matches(DIGEST_PATTERN, p["prompt_ids_sha256"]), "a prompt")
    need(isinstance(choices, list) and len(choices) > 0, "choices")
    for c in choices or ():
        need(isinstance(c, dict) and set(c) == _CHOICE, "a choice")
        need(all(_count(c[name]) for name in ("index", "prompt", "choice", "output_tokens")), "a choice")
        need(c["prompt"] < len(prompts or ()), "a choice of a prompt that is not there")
        need(isinstance(c["finish_reason"], str), "finish_reason")
        need(_matches(DIGEST_PATTERN, c["output_ids_sha256"]), "output_ids_sha256")


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def new_id(prefix: str, random_bytes: bytes) -> str:
    """An identifier that tells nothing and is safe in a path."""
    return prefix + hashlib.sha256(random_bytes).hexdigest()[:32]
