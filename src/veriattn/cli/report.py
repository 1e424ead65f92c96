"""The JSON of `generate`, and the same in one line for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veriattn.engine.engine import Engine, RequestState
from veriattn.engine.strategies import ExecutorReport


def generation_json(
    engine: Engine,
    states: Sequence[RequestState],
    *,
    name: str,
    load_s: float,
    logprobs: dict[int, list[dict[str, Any]]],
    single: bool,
) -> dict[str, Any]:
    """What was released, what was checked for it, and what it cost.

    `verified` speaks of the tokens in this very object, whether they are a whole answer or the beginning of one. A single
    prompt has `text`, `token_ids` and `finish_reason` at the top; a file of prompts has them in `results`, in order.
    """
    report = engine.report()
    verified = engine.guarantee != "none"
    cached = sum(len(s.request.prompt_ids) + max(0, len(s.output_ids) - 1) for s in states)
    results = [_result(state, logprobs) for state in states]
    top: dict[str, Any] = results[0] if single else {"results": results}
    return {
        **top,
        "verified": verified,
        "guarantee": engine.guarantee,
        "strategy": engine.config.strategy,
        "model": {"name": name, "path": str(engine.path), "digest": engine.model.manifest.digest},
        "prover": {"pid": report.prover_pid, "device": report.prover_device},
        "checks": report.checks(),
        "soundness_bits": report.soundness_bits,
        "kv": _kv(engine, report, cached),
        "kv_shield": engine.config.kv_shield,
        "shield_first_layers": engine.config.shield_first_layers,
        "emulated_link": None if engine.config.emulate_link is None else str(engine.config.emulate_link),
        "bytes": {"to_prover": report.bytes_to_prover, "from_prover": report.bytes_from_prover},
        "timing": {
            **_timing(states),
            "load_s": load_s,
            "verify_cpu_s": report.verify_cpu_s,
            "prover_wait_s": report.prover_wait_s,
        },
        "trace": engine.trace_summary,
        "restarts": engine.restarts,
    }


def _kv(engine: Engine, report: ExecutorReport, cached: int) -> dict[str, Any]:
    """Where keys were. Without a limit: how many each side cached in the end. With one: keys attended to, summed over the
    steps that went beyond it, by where they were: resident, streamed, in the TEE; the ratio after every step, the last one, and
    how many layers tried another. tee_bytes: memory of keys, values and what the checks keep per key, in the TEE."""
    on_prover = report.prover_pid is not None or report.prover_device is not None
    config = engine.config
    if on_prover and (config.prover_kv_tokens is not None or config.prover_kv_total is not None):
        return {
            "prover_tokens": report.kv_prover_tokens,
            "streamed_tokens": report.kv_streamed_tokens,
            "tee_tokens": report.kv_tee_tokens,
            "offload_ratio": report.offload_ratio,
            "offload_ratios": list(report.offload_ratios),
            "offload_trials": report.offload_trials,
            "tee_bytes": report.kv_tee_bytes,
        }
    return {
        "prover_tokens": cached if on_prover else 0,
        "streamed_tokens": 0,
        "tee_tokens": 0 if on_prover else cached,
        "offload_ratio": 0.0,
        "tee_bytes": report.kv_tee_bytes,
    }


def _result(state: RequestState, logprobs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "text": state.text,
        "token_ids": list(state.output_ids),
        "prompt_tokens": len(state.request.prompt_ids),
        "finish_reason": state.finish_reason,
    }
    if state.request.logprobs is not None:
        out["logprobs"] = logprobs.get(state.sequence.seq_id, [])
    return out


def _timing(states: Sequence[RequestState]) -> dict[str, float | None]:
    """Of one request its own; of several, from the first submission to the last token."""
    if len(states) == 1:
        return states[0].timing.to_json(len(states[0].request.prompt_ids), len(states[0].output_ids))
    began = min(s.timing.submitted for s in states)
    first = [s.timing.first_token for s in states if s.timing.first_token is not None]
    last = [s.timing.last_token for s in states if s.timing.last_token is not None]
    if not first or not last:
        return {"ttft_s": None, "tpot_s": None, "prefill_tokens_per_s": None, "decode_tokens_per_s": None}
    prompt, output = sum(len(s.request.prompt_ids) for s in states), sum(len(s.output_ids) for s in states)
    prefill, total = max(first) - began, max(last) - began
    return {
        "ttft_s": min(first) - began,
        "tpot_s": total / output if output else None,
        "prefill_tokens_per_s": prompt / prefill if prefill > 0 else None,
        "decode_tokens_per_s": output / total if total > 0 else None,
    }


def in_words(data: dict[str, Any], released: int) -> str:
    """One line: what was checked, by what strategy, how fast."""
    checks, timing = data["checks"], data["timing"]
    tokens = f"{released} token{'' if released == 1 else 's'}"
    if data["guarantee"] == "none":
        what = f"{tokens}, none of them checked (dangerous-unverified)"
    elif data["guarantee"] == "trusted-compute":
        what = f"{tokens} computed here, nothing outsourced (full-tee)"
    else:
        what = (
            f"verified: {tokens}, each shown after its checks ({checks['linear_rows']} linear and "
            f"{checks['attention_rows']} attention rows; a lie passes with probability <= 2^-{data['soundness_bits']})"
        )
    rate = timing["decode_tokens_per_s"]
    speed = "" if rate is None else f"; {rate:.1f} tokens/s"
    emulated = "" if data["emulated_link"] is None else f"; emulated link {data['emulated_link']}"
    return f"{what}{speed}{emulated}"
