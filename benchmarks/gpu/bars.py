"""The bars of the GPU's figures: bar, measured, met or not or missing, the floor, and what limits; tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.records import Record
from veriattn.bench import plot
from veriattn.bench.campaign import CHUNK
from veriattn.bench.kernels import Result
from veriattn.bench.report import (
    ADAPTIVE_FACTOR,
    ATTENTION_BARS,
    BASELINE_FRACTION,
    BASELINES,
    DECODE_BARS,
    PREFILL_BARS,
    VERIFIED_BARS,
    Conditions,
    Point,
    markdown,
    markdown_table,
    point_results,
    ratio_results,
    sweep_results,
)
from veriattn.bench.shapes import shape
from veriattn.bench.traffic import Part as Rows
from veriattn.bench.traffic import attention_bytes, prompt_bytes
from veriattn.errors import VeriattnError
from veriattn.verifier.session import Flow

#: Sides as people call them here.
SIDES = {"prover": "GPU", "link": "bus", "tee": "TEE"}
LONGEST, LAST = 6144, 10_000
MODELS = {"llama-3b": "3B", "llama-8b": "8B", "phi-14b": "14B"}
STATES = {True: "met", False: "not met", None: "for scale"}


@dataclass(frozen=True)
class Row:
    """One bar. state: met, not met, missing, failed, or for scale where the prover is no accelerator."""

    what: str
    bar: str
    measured: str = "-"
    state: str = "missing"
    floor: str = "-"
    limit: str = "-"


@dataclass
class Figures:
    """What a file of results says. campaigns: points of one part, by what they have in common."""

    lines: dict[str, Result] = field(default_factory=dict)
    points: dict[tuple[str, str, int, int], Point] = field(default_factory=dict)
    campaigns: dict[tuple[str, Conditions], list[Point]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def limit(self, prefix: str, length: int, batch: int, *strategies: str) -> str:
        """What the floors of these strategies are limited by."""
        found = [(s, self.points.get((prefix, s, length, batch))) for s in strategies]
        return "; ".join(f"{s}: {SIDES[p.floor.limit]}" for s, p in found if p is not None) or "-"


def figures(records: Iterable[Record]) -> Figures:
    """The last record of every piece counts, and of parts that never came through what they said at their end."""
    f = Figures()
    last: dict[tuple[str, str], Record] = {}
    for r in records:
        if r["status"] == "done":
            last[r["part"], r["piece"]] = r
            f.failed.pop(r["part"], None)
        elif r["status"] == "failed":
            f.failed[r["part"]] = (r["tail"] or ["no output"])[-1]
    order = [(p.name, piece) for p in PARTS for piece in p.pieces]
    for at in order:
        if (r := last.get(at)) is None:
            continue
        f.lines |= {line["name"]: line for line in r["results"]}
        if "conditions" in r:
            points = [Point.from_json(p) for p in r["points"]]
            f.campaigns.setdefault((r["part"], Conditions(**r["conditions"])), []).extend(points)
    for (_, conditions), points in f.campaigns.items():
        swept = len({p.ratio for p in points if p.ratio != "auto"} - {None}) > 0
        compared = sweep_results(conditions, points) if swept else ratio_results(conditions, points)
        found = [*compared, *(r for p in points for r in point_results(conditions, p))]
        f.lines |= {line["name"]: line for line in found}
        if not swept:
            f.points |= {(conditions.prefix, p.strategy, p.length, p.batch): p for p in points}
    return f


# -- bars -------------------------------------------------------------------------------------------------------------


def rows(f: Figures) -> list[Row]:
    """Every bar, in the order of the table that sets them."""
    found = [*_kernels(f), *_baselines(f), *_price(f)]
    for strategy in ("veriattn", "run-ahead"):
        for model in MODELS:
            for batch in (1, 5):
                found += _speed_ups(f, f"prefill.{model}.emulated15", strategy, batch)
    return [*found, *_traffic(f), *_ids(f), *_decoding(f), *_sweep(f)]


def _state(met: bool | None) -> str:
    return STATES[met]


def _worst(names: Sequence[str], f: Figures) -> Result | None:
    """The line that is farthest from its bar, once all are there."""
    found = [f.lines[n] for n in names if n in f.lines]
    if len(found) < len(names) or not found:
        return None
    return max(found, key=lambda r: (not r["met"], abs(r["value"] - (r["bar"] or 0.0)) * (1 if not r["met"] else -1)))


def _kernels(f: Figures) -> list[Row]:
    tests, what = f.lines.get("gpu.tests"), "kernels, backend and sessions: bit equality"
    if tests is not None:
        found = [Row(what, "all", f"{tests['value']:.0f} tests passed", "met", limit="-")]
    elif "correctness" in f.failed:
        found = [Row(what, "all", f.failed["correctness"], "failed")]
    else:
        found = [Row(what, "all")]
    products = [n for n in f.lines if n.startswith("gemm.rate.")]
    what, worst = "int8 products of 1,024 rows and more, of the best int8 rate seen", _worst(products, f)
    if worst is None:
        found.append(Row(what, ">= 60%"))
    else:
        name = worst["name"].removeprefix("gemm.rate.")
        found.append(
            Row(what, ">= 60%", f"{worst['value']:.0%} at worst ({name})", _state(worst["met"]), "100%", "GPU")
        )
    for tokens in (1024, 3072, LONGEST):
        names = [n for n in (f"prefill_attention{v}.{tokens}.over_flash" for v in ("", ".table")) if n in f.lines]
        line = next((f.lines[n] for n in names if f.lines[n]["bar"] is not None), None)
        what = f"attention of a prompt of {tokens:,} over bf16 FlashAttention"
        found.append(Row(what, "<= 3") if line is None else _ratio_row(what, "<=", line, "GPU"))
    return found


def _ratio_row(what: str, sign: str, line: Result, limit: str) -> Row:
    best = "-" if line["roofline"] is None else f"{line['roofline']:.3g}"
    return Row(what, f"{sign} {line['bar']:g}", f"{line['value']:.3g}", _state(line["met"]), best, limit)


def _baselines(f: Figures) -> list[Row]:
    places = [
        ("prefill.llama-8b", LONGEST, "8B, prompt of 6,144, bus as it is"),
        ("decode.llama-8b", LAST, "8B, token at 10,000, bus as it is"),
        *(
            (f"prefill.{m}.emulated15", LONGEST, f"{name}, prompt of 6,144, 15 GB/s emulated")
            for m, name in MODELS.items()
        ),
        ("decode.llama-8b.emulated15", LAST, "8B, token at 10,000, 15 GB/s emulated, 2,000 keys kept"),
    ]
    found, bar = [], f">= {BASELINE_FRACTION:.0%}"
    for baseline in BASELINES:
        for prefix, length, where in places:
            what, p = f"`{baseline}` of its own roofline: {where}", f.points.get((prefix, baseline, length, 1))
            if p is None:
                found.append(Row(what, bar))
                continue
            share = p.floor.seconds / p.seconds
            measured = f"{share:.0%} ({p.seconds:.3g} s)"
            state = _state(share >= BASELINE_FRACTION)
            found.append(Row(what, bar, measured, state, f"{p.floor.seconds:.3g} s", SIDES[p.floor.limit]))
    return found


def _price(f: Figures) -> list[Row]:
    found = []
    for phase, length, name in (("prefill", LONGEST, "TTFT at 6,144"), ("decode", LAST, "TPOT at 10,000")):
        prefix, bar = f"{phase}.llama-8b", VERIFIED_BARS[phase]
        what = f"8B, bus as it is: {name}, `run-ahead` over unverified"
        line = f.lines.get(f"{prefix}.run-ahead_to_dangerous-unverified.n{length}.b1")
        limit = f.limit(prefix, length, 1, "run-ahead", "dangerous-unverified")
        found.append(Row(what, f"<= {bar:g}") if line is None else _ratio_row(what, "<=", line, limit))
        for baseline in BASELINES:
            what = f"8B, bus as it is: {name}, `run-ahead` over `{baseline}`"
            line = f.lines.get(f"{prefix}.run-ahead_over_{baseline}.n{length}.b1")
            if line is None:
                found.append(Row(what, "reported"))
                continue
            limit = f.limit(prefix, length, 1, "run-ahead", baseline)
            best = "-" if line["roofline"] is None else f"{line['roofline']:.3g}"
            found.append(Row(what, "reported", f"{line['value']:.3g}", "reported", best, limit))
    return found


def _speed_ups(f: Figures, prefix: str, strategy: str, batch: int) -> list[Row]:
    found, model = [], MODELS[prefix.split(".")[1]]
    for suffix, bars, part in (("", PREFILL_BARS, "TTFT at 6,144"), (".attention", ATTENTION_BARS, "attention alone")):
        for baseline in BASELINES:
            bar = bars.get((strategy, baseline))
            if bar is None:
                continue
            what = f"{model}, 15 GB/s emulated, batch {batch}: {part}, `{strategy}` over `{baseline}`"
            line = f.lines.get(f"{prefix}.{strategy}_over_{baseline}.n{LONGEST}.b{batch}{suffix}")
            limit = f.limit(prefix, LONGEST, batch, strategy, baseline)
            found.append(Row(what, f">= {bar:g}") if line is None else _ratio_row(what, ">=", line, limit))
    return found


def _decoding(f: Figures) -> list[Row]:
    found, prefix = [], "decode.llama-8b.emulated15"
    for (strategy, baseline), bar in DECODE_BARS.items():
        what = f"8B, 15 GB/s emulated, 2,000 keys kept: TPOT at 10,000, `{strategy}` over `{baseline}`"
        line = f.lines.get(f"{prefix}.{strategy}_over_{baseline}.n{LAST}.b1")
        limit = f.limit(prefix, LAST, 1, strategy, baseline)
        found.append(Row(what, f">= {bar:g}") if line is None else _ratio_row(what, ">=", line, limit))
    return found


def _traffic(f: Figures) -> list[Row]:
    """Bytes on the link are those on paper, and on paper those of attention grow as the tokens do."""
    found, prefix, c = [], "prefill.llama-8b.emulated15", shape("llama-8b")
    for flow in (Flow.RUN_AHEAD, Flow.VERIATTN):
        whole = prompt_bytes(c, flow, LONGEST, CHUNK)
        per_token = (whole.to_prover + whole.from_prover) / LONGEST / 1e6
        theirs = 2 * c.num_heads * LONGEST * c.num_layers / 1e6
        what = f"8B, prompt of 6,144: attention's traffic under `{flow.value}` is linear in tokens"
        points = [f.points.get((prefix, flow.value, n, 1)) for n in (1024, 3072, LONGEST)]
        if any(p is None for p in points):
            found.append(Row(what, "linear"))
            continue
        exact = all(p is not None and p.sample.moved == p.sample.paper for p in points)
        shares = [_attention_per_token(flow, n) for n in (1024, LONGEST)]
        measured = (
            f"{shares[0] / 1e3:.2f} kB a token and layer at 1,024, {shares[1] / 1e3:.2f} at 6,144; "
            f"{per_token:.2f} MB a token in all (the paper's scores alone, FP16, at 6,144: {theirs:.1f})"
        )
        met = exact and abs(shares[1] / shares[0] - 1) < 0.01
        found.append(Row(what, "linear", measured, _state(met), f"{per_token:.2f} MB on paper", "bus"))
    return found


def _attention_per_token(flow: Flow, tokens: int) -> float:
    total = 0
    for at in range(0, tokens, CHUNK):
        moved = attention_bytes(shape("llama-8b"), flow, [Rows(at, CHUNK)])
        total += moved.to_prover + moved.from_prover
    return total / tokens


def _ids(f: Figures) -> list[Row]:
    what, line = "token ids and logits of every flow beside the CPU backend's", f.lines.get("ids.equal")
    if line is None:
        failed = f.failed.get("ids")
        return [Row(what, "equal") if failed is None else Row(what, "equal", failed, "failed")]
    return [Row(what, "equal", f"{line['value']:.0f} {line['unit']}", _state(line["met"]))]


def _sweep(f: Figures) -> list[Row]:
    found = []
    for prefix, where in (("decode.llama-8b", "bus as it is"), ("decode.llama-8b.emulated15", "15 GB/s emulated")):
        names = [n for n in f.lines if n.startswith(f"{prefix}.veriattn.n") and n.endswith(".auto_over_best_fixed")]
        what, worst = f"8B, offload ratio, {where}: adaptive over the best fixed one", _worst(names, f)
        bar = f"<= {ADAPTIVE_FACTOR:g}"
        if worst is None:
            if where == "bus as it is":
                found.append(Row(what, bar))
            continue
        at = worst["name"].removeprefix(f"{prefix}.veriattn.").removesuffix(".auto_over_best_fixed")
        found.append(Row(what, bar, f"{worst['value']:.3g} at worst ({at})", _state(worst["met"])))
    return found


# -- the report -------------------------------------------------------------------------------------------------------


def document(f: Figures, records: Sequence[Record]) -> str:
    """Everything, as Markdown."""
    text = [_head(records), "", bar_table(rows(f))]
    for name, last in f.failed.items():
        text += ["", f"The part `{name}` failed: {last}"]
    for (part, conditions), points in f.campaigns.items():
        text += ["", f"## {part}: {conditions.title}", "", markdown(conditions, points)]
    return "\n".join(text) + "\n"


def _head(records: Sequence[Record]) -> str:
    if not records:
        return "Nothing has been measured."
    r = records[-1]
    commits = list(dict.fromkeys(str(x["commit"] or f"source {x['source']}") for x in records))
    machine = f"{r['card']}; {r['cores']} cores of {r['cpu']} ({r['isa']})"
    return f"{machine}; {', '.join(commits)}; {records[0]['time']} to {r['time']}."


def bar_table(found: Sequence[Row]) -> str:
    """The bars alone."""
    columns = ("what", "bar", "measured", "", "at best (floor)", "limit of the floor")
    return markdown_table(columns, [(r.what, r.bar, r.measured, r.state, r.floor, r.limit) for r in found])


def draw(f: Figures, out: Path) -> tuple[list[Path], str]:
    """Pictures of every campaign, and why there are none."""
    drawn: list[Path] = []
    for (part, conditions), points in f.campaigns.items():
        try:
            drawn += plot.draw(out / f"gpu-{part}", conditions, points)
        except VeriattnError as error:
            return drawn, str(error)
    return drawn, ""
