"""From samples to results: times of the whole model, beside their floors; ratios between strategies; tables and lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veriattn.bench.kernels import Result
from veriattn.bench.measure import Sample
from veriattn.bench.roofline import Floor
from veriattn.bench.traffic import Bytes
from veriattn.errors import UsageError

#: Speed-ups that the paper states at its longest prompt and answer, its bus emulated; (strategy, baseline) -> factor.
PREFILL_BARS = {
    ("veriattn", "tsdp"): 2.60, ("veriattn", "full-tee"): 3.14, ("run-ahead", "tsdp"): 5.0, ("run-ahead", "full-tee"): 4.0,
}  # fmt: skip
ATTENTION_BARS = {("veriattn", "tsdp"): 4.19, ("veriattn", "full-tee"): 3.05}
DECODE_BARS = {
    ("veriattn", "tsdp"): 3.86, ("veriattn", "full-tee"): 2.21, ("run-ahead", "tsdp"): 3.86, ("run-ahead", "full-tee"): 2.21,
}  # fmt: skip
#: How many times the time of the unverified prover `run-ahead` may take, on the link as it is.
VERIFIED_BARS = {"prefill": 6.0, "decode": 1.3}
PAPER_LINK_GB_PER_S = 15.0
PAPER_PREFILL, PAPER_DECODE, PAPER_KV_TOKENS = 6000, 10_000, 2000

BASELINES = ("tsdp", "full-tee")
#: A baseline below this share of its own floor is no baseline.
BASELINE_FRACTION = 0.7
#: An adaptive ratio may take this much longer than the best fixed one.
ADAPTIVE_FACTOR = 1.10


def scaled(total_s: float, head_s: float, layers: int, model_layers: int) -> float:
    """Seconds of the whole model from a run with fewer layers: all but the product with the vocabulary grows with them."""
    return (total_s - head_s) * model_layers / layers + head_s


@dataclass(frozen=True)
class Conditions:
    """What all points of a run have in common."""

    phase: str
    shape: str
    layers: int
    model_layers: int
    device: str
    threads: int
    prover_threads: int | None
    emulated_gb_per_s: float | None
    prover_kv_tokens: int | None = None

    @property
    def prefix(self) -> str:
        """The beginning of every name; a run over an emulated link says so."""
        link = "" if self.emulated_gb_per_s is None else f".emulated{self.emulated_gb_per_s:g}"
        return f"{self.phase}.{self.shape}{link}"

    @property
    def title(self) -> str:
        """For tables and plots."""
        text = f"{self.phase}, {self.shape}, {self.device} prover, {self.threads} thread(s) in the TEE"
        if self.prover_threads is not None:
            text += f", {self.prover_threads} in the prover"
        if self.layers != self.model_layers:
            text += f"; {self.layers} of {self.model_layers} layers run, time scaled"
        if self.prover_kv_tokens is not None:
            text += f"; the prover keeps {self.prover_kv_tokens} keys of a sequence"
        return text + ("" if self.emulated_gb_per_s is None else f"; link of {self.emulated_gb_per_s:g} GB/s, emulated")

    @property
    def like_the_paper(self) -> bool:
        """Whether the link is the paper's."""
        return self.emulated_gb_per_s == PAPER_LINK_GB_PER_S


@dataclass(frozen=True)
class Point:
    """A strategy at a length and a batch. seconds, attention_s and the floors are of the whole model; ratio: a fixed offload
    ratio, "auto", or None where there is none to choose."""

    strategy: str
    length: int
    batch: int
    seconds: float
    attention_s: float | None
    floor: Floor
    attention_floor: Floor
    sample: Sample
    ratio: float | str | None = None

    @property
    def name(self) -> str:
        part = "" if self.ratio is None else f".p{self.ratio}"
        return f"{self.strategy}.n{self.length}.b{self.batch}{part}"

    def to_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        floors = {
            name: {**asdict(f), "limit": f.limit}
            for name, f in (("floor", self.floor), ("attention_floor", self.attention_floor))
        }
        own = {"strategy": self.strategy, "length": self.length, "batch": self.batch, "ratio": self.ratio}
        return {
            **own, "seconds": self.seconds, "attention_s": self.attention_s, "limit": self.floor.limit, **floors,
            "measured": asdict(self.sample),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """The point that `to_json` wrote down. Raises: KeyError, TypeError for anything else."""
        floors = {name: {k: v for k, v in data[name].items() if k != "limit"} for name in ("floor", "attention_floor")}
        measured = dict(data["measured"])
        measured |= {name: Bytes(**measured[name]) for name in ("moved", "paper")}
        return cls(
            data["strategy"], data["length"], data["batch"], data["seconds"], data["attention_s"], Floor(**floors["floor"]),
            Floor(**floors["attention_floor"]), Sample(**measured), data["ratio"],
        )  # fmt: skip


def measured_limit(s: Sample) -> str | None:
    """The side that was busy for the greatest share of a traced repetition. None where nobody looked."""
    if s.shares is None:
        return None
    busy = {}
    for side, name in (("verifier", "tee"), ("prover", "prover")):
        shares = s.shares.get(side)
        if shares is not None:
            busy[name] = 1.0 - shares["idle"] - shares.get("blocked", 0.0)
    link = s.shares.get("link")
    if link is not None:
        busy["link"] = max(link.values())
    return max(busy, key=lambda side: busy[side]) if busy else None


def line(
    name: str, value: float, unit: str, *, bar: float | None = None, met: bool | None = None,
    roofline: float | None = None, higher: bool = False,
) -> Result:  # fmt: skip
    """One result. fraction: how near the roofline, 1 at it."""
    fraction = None
    if roofline is not None and value > 0 and roofline > 0 and math.isfinite(roofline):
        fraction = value / roofline if higher else roofline / value
    return {
        "name": name, "value": value, "unit": unit, "bar": bar, "met": met, "roofline": roofline, "fraction": fraction,
    }  # fmt: skip


def point_results(conditions: Conditions, p: Point) -> list[Result]:
    """Everything about one point."""
    name, s = f"{conditions.prefix}.{p.name}", p.sample
    what = "ttft" if conditions.phase == "prefill" else "tpot"
    bar = p.floor.seconds / BASELINE_FRACTION if p.strategy in BASELINES else None
    known = p.floor.seconds > 0
    results = [
        line(f"{name}.{what}", p.seconds, "s", bar=bar, met=None if bar is None else p.seconds <= bar,
             roofline=p.floor.seconds if known else None),
    ]  # fmt: skip
    if p.attention_s is not None:
        results.append(
            line(f"{name}.attention", p.attention_s, "s", roofline=p.attention_floor.seconds if known else None)
        )
    for direction in ("to_prover", "from_prover"):
        moved, paper = getattr(s.moved, direction), getattr(s.paper, direction)
        results.append(line(f"{name}.bytes_{direction}", moved, "B", roofline=paper))
    results.append(line(f"{name}.tee_cpu", s.tee_cpu_s, "s"))
    results.append(line(f"{name}.tee_peak", s.tee_peak_bytes, "B"))
    if s.prover_peak_bytes is not None:
        results.append(line(f"{name}.prover_peak", s.prover_peak_bytes, "B"))
    if s.device_bytes is not None:
        results.append(line(f"{name}.device_peak", s.device_bytes, "B"))
    for side in ("verifier", "prover"):
        shares = None if s.shares is None else s.shares.get(side)
        if shares is not None:
            results.append(line(f"{name}.{'tee' if side == 'verifier' else side}_idle", shares["idle"], "share"))
    return results


def ratio_results(conditions: Conditions, points: Sequence[Point]) -> list[Result]:
    """How much faster the verified strategies are than the baselines of the same run, all of it and attention alone."""
    at = {(p.strategy, p.length, p.batch): p for p in points if p.ratio in (None, "auto")}
    bars, longest = _bars(conditions)
    results = []
    for (strategy, length, batch), p in at.items():
        for baseline in BASELINES:
            other = at.get((baseline, length, batch))
            if other is None or strategy not in ("run-ahead", "veriattn"):
                continue
            name = f"{conditions.prefix}.{strategy}_over_{baseline}.n{length}.b{batch}"
            applies = length >= longest
            for suffix, value, best, table in (
                ("", other.seconds / p.seconds, other.floor.seconds / p.floor.seconds, bars[0]),
                (".attention", *_attention_ratio(other, p), bars[1]),
            ):
                if value is None:
                    continue
                bar = table.get((strategy, baseline)) if applies else None
                # The bars are for an accelerator as prover; elsewhere they are shown for scale.
                met = value >= bar if bar is not None and conditions.device != "cpu" else None
                results.append(line(name + suffix, value, "x", bar=bar, met=met, roofline=best, higher=True))
    return results + _price_results(conditions, at)


def _price_results(conditions: Conditions, at: Mapping[tuple[str, int, int], Point]) -> list[Result]:
    """What verification costs: `run-ahead` over the same prover unverified."""
    results = []
    for (strategy, length, batch), p in at.items():
        plain = at.get(("dangerous-unverified", length, batch))
        if plain is None or strategy != "run-ahead":
            continue
        value, best = p.seconds / plain.seconds, p.floor.seconds / plain.floor.seconds
        longest = PAPER_PREFILL if conditions.phase == "prefill" else PAPER_DECODE
        as_it_is = conditions.emulated_gb_per_s is None and conditions.prover_kv_tokens is None
        bar = VERIFIED_BARS[conditions.phase] if as_it_is and length >= longest else None
        met = value <= bar if bar is not None and conditions.device != "cpu" else None
        name = f"{conditions.prefix}.run-ahead_to_dangerous-unverified.n{length}.b{batch}"
        results.append(line(name, value, "x", bar=bar, met=met, roofline=best))
    return results


def _attention_ratio(other: Point, p: Point) -> tuple[float | None, float | None]:
    if not other.attention_s or not p.attention_s or not p.attention_floor.seconds:
        return None, None
    return other.attention_s / p.attention_s, other.attention_floor.seconds / p.attention_floor.seconds


_Bars = Mapping[tuple[str, str], float]


def _bars(conditions: Conditions) -> tuple[tuple[_Bars, _Bars], int]:
    none: _Bars = {}
    if not conditions.like_the_paper:
        return (none, none), 0
    if conditions.phase == "prefill":
        return (PREFILL_BARS, ATTENTION_BARS), PAPER_PREFILL
    return (DECODE_BARS if conditions.prover_kv_tokens == PAPER_KV_TOKENS else none, none), PAPER_DECODE


def sweep_results(conditions: Conditions, points: Sequence[Point]) -> list[Result]:
    """The adaptive ratio against the best fixed one, at every length and batch; of the step and of attention alone."""
    results = []
    for strategy, length, batch in dict.fromkeys((p.strategy, p.length, p.batch) for p in points):
        here = [p for p in points if (p.strategy, p.length, p.batch) == (strategy, length, batch)]
        auto = next((p for p in here if p.ratio == "auto"), None)
        fixed = [p for p in here if p.ratio != "auto"]
        if auto is None or not fixed:
            continue
        best = min(fixed, key=lambda p: p.seconds)
        name = f"{conditions.prefix}.{strategy}.n{length}.b{batch}"
        value = auto.seconds / best.seconds
        results.append(
            line(f"{name}.auto_over_best_fixed", value, "x", bar=ADAPTIVE_FACTOR, met=value <= ADAPTIVE_FACTOR)
        )
        results.append(line(f"{name}.best_fixed_ratio", float(best.ratio or 0.0), "p"))
        chosen = auto.sample.ratio
        if chosen is not None:
            results.append(line(f"{name}.auto_ratio", chosen, "p"))
    return results


# -- for people and files ---------------------------------------------------------------------------------------------


def table(conditions: Conditions, points: Sequence[Point]) -> str:
    """One line a point."""
    head = (
        f"{'strategy':22}{'length':>7}{'batch':>6}{'p':>7}{'seconds':>11}{'floor':>10}{'of it':>7}{'limit':>8}"
        f"{'attention':>11}{'MB to':>10}{'MB from':>10}{'TEE CPU s':>11}{'idle TEE':>9}{'prover':>8}"
        f"{'peak TEE':>10}{'prover':>8}"
    )
    lines = [conditions.title, head]
    mark = "" if conditions.emulated_gb_per_s is None else "  emulated"
    for p in points:
        s = p.sample
        ratio = "" if p.ratio is None else str(p.ratio)
        if p.ratio == "auto" and s.ratio is not None:
            ratio = f"~{s.ratio:.2f}"
        attention = "" if p.attention_s is None else f"{p.attention_s:.4f}"
        prover_peak = "" if s.prover_peak_bytes is None else f"{s.prover_peak_bytes / 1e6:.0f}"
        floor = f"{p.floor.seconds:10.4f}{p.floor.seconds / p.seconds:7.0%}{p.floor.limit:>8}"
        if p.floor.seconds <= 0:
            floor = " " * len(floor)
        lines.append(
            f"{p.strategy:22}{p.length:7}{p.batch:6}{ratio:>7}{p.seconds:11.4f}{floor}"
            f"{attention:>11}{s.moved.to_prover / 1e6:10.2f}"
            f"{s.moved.from_prover / 1e6:10.2f}{s.tee_cpu_s:11.4f}{_idle(s, 'verifier'):>9}{_idle(s, 'prover'):>8}"
            f"{s.tee_peak_bytes / 1e6:7.0f} MB{prover_peak:>8}{mark}"
        )
    return "\n".join(lines)


def markdown(conditions: Conditions, points: Sequence[Point]) -> str:
    """The same for documents. Prompts in seconds, tokens in milliseconds."""
    factor, unit = (1.0, "s") if conditions.phase == "prefill" else (1e3, "ms")
    columns = (
        "strategy", "tokens", "batch", "p", f"time, {unit}", f"floor, {unit}", "of it", "limit of the floor", "busiest",
        f"attention, {unit}", "MB to / from the prover", "TEE CPU, s", "idle TEE / prover", "peak GB TEE / prover / GPU",
    )  # fmt: skip
    rows = []
    for p in points:
        s, known = p.sample, p.floor.seconds > 0
        ratio = "" if p.ratio is None else f"{p.ratio:g}" if isinstance(p.ratio, float) else p.ratio
        if p.ratio == "auto" and s.ratio is not None:
            ratio = f"~{s.ratio:.2f}"
        peaks = [s.tee_peak_bytes, s.prover_peak_bytes, s.device_bytes]
        rows.append((
            f"`{p.strategy}`", f"{p.length:,}", str(p.batch), ratio, f"{factor * p.seconds:.4g}",
            f"{factor * p.floor.seconds:.4g}" if known else "-", f"{p.floor.seconds / p.seconds:.0%}" if known else "-",
            p.floor.limit if known else "-", measured_limit(s) or "-",
            "-" if p.attention_s is None else f"{factor * p.attention_s:.4g}",
            f"{s.moved.to_prover / 1e6:.2f} / {s.moved.from_prover / 1e6:.2f}", f"{s.tee_cpu_s:.4g}",
            f"{_idle(s, 'verifier') or '-'} / {_idle(s, 'prover') or '-'}",
            " / ".join("-" if b is None else f"{b / 1e9:.1f}" for b in peaks),
        ))  # fmt: skip
    return markdown_table(columns, rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that are empty throughout are left out."""
    kept = [i for i in range(len(columns)) if not rows or any(row[i] for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line_[i] for i in kept) + " |" for line_ in lines)


def _idle(s: Sample, side: str) -> str:
    shares = None if s.shares is None else s.shares.get(side)
    return "" if shares is None else f"{shares['idle']:.0%}"


def table_of_lines(results: Sequence[Result]) -> str:
    """Name, value, bar: for ratios and single figures."""
    lines = []
    for r in results:
        text = f"{r['name']:64} {r['value']:10.4g} {r['unit']}"
        if r["roofline"] is not None:
            text += f"  (at best {r['roofline']:.4g})"
        if r["bar"] is not None:
            text += f"  bar {r['bar']:.4g}" + {True: " met", False: " missed", None: ""}[r["met"]]
        lines.append(text)
    return "\n".join(lines)


def save(path: Path, header: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Append results as JSON lines, each with the header. Raises: UsageError where the file cannot be written."""
    stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **header}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as out:
            for r in results:
                out.write(json.dumps({**stamp, **r}, allow_nan=False) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="is there room?") from error
