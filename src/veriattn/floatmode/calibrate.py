"""Tolerances from clean runs: twice the largest residual of each check over ten repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from veriattn.errors import ModelError, UsageError
from veriattn.floatmode.engine import FloatConfig, FloatModel, FloatSession, tolerance_file
from veriattn.floatmode.params import Tolerances
from veriattn.floatmode.trusted import recording

STARTS, START_TOKENS = 10, 8


def calibration_prompts(ids: Sequence[int], tokens: int) -> list[list[int]]:
    """A long prompt, one of an eighth, and many beginnings: the first token of a sequence carries the largest activations,
    which differ from token to token, and a tolerance is the residual of the worst row.
    """
    ids = list(ids)
    prompts = [ids[:tokens], ids[tokens : tokens + max(1, tokens // 8)] or ids[:1]]
    step = max(1, len(ids) // STARTS)
    return prompts + [ids[at : at + START_TOKENS] for at in range(0, len(ids), step)][:STARTS]


def calibrate(
    model: FloatModel,
    config: FloatConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Tolerances:
    """Run the prompts `calibration_runs` times over, the first two with `max_tokens` of decoding; the prover is taken to be
    clean.

    Trust: the prover must be honest here. One that is not makes its own tolerance wide: calibrate where you trust it.
    Raises: ModelError where an honest claim was not finite or out of range (float16).
    """
    if config.strategy == "full-tee":
        raise UsageError("full-tee outsources nothing", hint="there is nothing to calibrate")
    if not prompts:
        raise UsageError("calibration needs a prompt")
    largest: dict[str, float] = {}
    runs, longest = config.params.calibration_runs, 0
    record = recording(largest)
    refused: list[str] = []

    def judge(key: str, residual: float) -> bool:
        if not record(key, residual):
            refused.append(key)
        return True

    with FloatSession(model, config, judge, secret_sets=runs) as session:
        for run in range(runs):
            for number, prompt in enumerate(prompts):
                for _ in session.generate(prompt, max_tokens if number < 2 else 1):
                    longest = max(longest, session.ops.length)
                    if refused:
                        raise ModelError(
                            f"an honest claim of {refused[0]} cannot be checked in {config.sent_exp_format}: out of range",
                            hint="send attention weights in a wider format (--exp-format float32)",
                        )
            session.next_secrets()
            progress(run + 1, runs)
    values = {key: config.params.factor * value for key, value in largest.items()}
    return Tolerances(
        model.source.digest(), config.format, config.sent_exp_format, config.strategy, config.backend, config.params,
        longest, values,
    )  # fmt: skip


def calibrate_and_save(
    model: FloatModel,
    config: FloatConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Tolerances:
    """`calibrate`, stored under the model's digest."""
    tolerances = calibrate(model, config, prompts, max_tokens, progress)
    tolerances.save(tolerance_file(tolerances.digest, config))
    return tolerances
