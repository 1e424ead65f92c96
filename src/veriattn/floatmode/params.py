"""Parameters and calibrated tolerances of the floating-point checks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from veriattn.errors import ModelError, UsageError

Format = Literal["float32", "bfloat16", "float16"]
Challenges = Literal["fresh", "sequence"]
FORMATS: tuple[Format, ...] = get_args(Format)
GUARANTEE = "tolerance"
#: Said on every output of this mode.
NOTICE = "floating point, checked within a tolerance: small lies can pass (docs/paper-mode.md)"


@dataclass(frozen=True)
class CheckParams:
    """What the paper leaves open, explicit.

    n_a: coefficients are drawn from 1..n_a. tau_a: coefficient vectors. tau_g: Gaussian factors per log-product.
    repetitions: Gaussian vectors of GVFAVeriMM. factor: tolerance over the largest clean residual; calibration_runs: runs
    that this is the largest of. challenges: `fresh` draws attention's per call, `sequence` keeps them for a sequence, with
    running projections (the paper's, cheaper in decode, can be learnt where a session goes on after a reject). The
    vectors of weight matrices are drawn per session in both, because W.T w costs as much as a product with one token.
    """

    n_a: int = 16
    tau_a: int = 1
    tau_g: int = 8
    repetitions: int = 3
    factor: float = 2.0
    calibration_runs: int = 10
    challenges: Challenges = "fresh"

    def __post_init__(self) -> None:
        if not 1 <= self.n_a <= 4096:
            raise UsageError(f"n_a is {self.n_a}, must be from 1 to 4096")
        for name in ("tau_a", "tau_g", "repetitions", "calibration_runs"):
            if not 1 <= getattr(self, name) <= 64:
                raise UsageError(f"{name} is {getattr(self, name)}, must be from 1 to 64")
        if not 1.0 <= self.factor <= 1e6:
            raise UsageError(f"the tolerance factor is {self.factor}, must be from 1 to 1e6")
        if self.challenges not in get_args(Challenges):
            raise UsageError(f"unknown challenges {self.challenges!r}", hint="fresh or sequence")


def kind_of(check: str) -> str:
    """`q`, `exp`, ... of a check's name `layer.kind`."""
    return check.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Tolerances:
    """Largest residual that each kind of check lets pass, and what it was calibrated for.

    One tolerance per kind for all layers, as the paper has one per check: residuals have long tails (a few tokens carry very
    large activations), and per layer too few of them are seen to bound the next.

    Trust: the trusted side's own file. A tolerance that is looked up and not there is an error, never a pass.
    """

    digest: str
    format: Format
    exp_format: Format
    strategy: str
    backend: str
    params: CheckParams
    max_tokens: int
    values: dict[str, float] = field(default_factory=dict)

    def get(self, key: str) -> float:
        """Raises: ModelError where nothing was calibrated for it."""
        kind = kind_of(key)
        if kind not in self.values:
            raise ModelError(f"no tolerance was calibrated for {key}", hint="run `veriattn calibrate` again")
        return self.values[kind]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tolerances:
        """Raises: ModelError (missing, damaged)."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data["params"] = CheckParams(**data["params"])
            found = cls(**data)
            good = all(isinstance(v, float) and 0.0 <= v < float("inf") for v in found.values.values())
        except FileNotFoundError:
            raise ModelError("this model has no tolerances", hint="`veriattn calibrate` measures them") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path} holds no tolerances: {error}", hint="run `veriattn calibrate` again") from error
        if not good:
            raise ModelError(f"{path} has a tolerance that is not finite", hint="run `veriattn calibrate` again")
        return found
