"""`python -m benchmarks.gpu`: every figure that needs a GPU, part by part, and a report of the bars. `make bench-gpu` runs it.

Needs Python, NumPy, torch with CUDA, Triton, pytest and the native extension (`tools/build_native.py`), and no network. What
is complete for this code, this card and these settings is not measured again: after `--budget SECONDS` the next call goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from benchmarks.gpu import bars, child
from benchmarks.gpu.drive import Driver, Outcome, make_kernels, told
from benchmarks.gpu.parts import PARTS, Campaign, Part, adapted, chosen, estimate, settings
from benchmarks.gpu.records import ROOT, Origin, Results, origin, source_digest
from veriattn.bench.shapes import SHAPES
from veriattn.errors import ModelError, UsageError, VeriattnError
from veriattn.home import resolve_model
from veriattn.spec.modelfile import MANIFEST_FILE, read_manifest

RESULTS = ROOT / "benchmarks" / "results"
FILE = "gpu.jsonl"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", metavar="A,B", help="only these, in the order of the list")
    parser.add_argument("--list", action="store_true", help="parts, what is missing of them and what it will take")
    parser.add_argument("--report", action="store_true", help="report what is in the file of results; measure nothing")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long; the next call goes on")
    parser.add_argument("--again", action="store_true", help="measure parts that are complete, too")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of every model; times are scaled to all")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the TEE [all cores]")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"results, report and pictures [{RESULTS.relative_to(ROOT)}]"
    )
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="random weights and compiled kernels [build/gpu]")
    parser.add_argument("--model", metavar="MODEL", help="a real model for `ids`, shortened [smollm2 if it was pulled]")
    parser.add_argument("--of", metavar="SOURCE,SOURCE", help="count results of these versions of the code as well")
    parser.add_argument("--no-pictures", action="store_true", help="draw none")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--shape-override", choices=sorted(SHAPES), metavar="SHAPE", help="for a rehearsal")
    parser.add_argument("--child", metavar="PART", help=argparse.SUPPRESS)
    parser.add_argument("--pieces", help=argparse.SUPPRESS)
    return parser


class _Run:
    """One call: what its options come to."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.out: Path = (a.out or RESULTS).resolve()
        self.models: Path = (a.model_dir or ROOT / "build" / "gpu").resolve()
        self.threads: int = a.threads or len(os.sched_getaffinity(0))
        self.sources = [source_digest(), *(a.of.split(",") if a.of else ())]
        self.results = Results(self.out / FILE, self.sources)
        if a.layers is not None and a.layers < 1:
            raise UsageError("--layers must be 1 or more")
        self.parts = tuple(adapted(p, a.layers, a.shape_override) for p in chosen(a.parts))

    @property
    def model(self) -> Path | None:
        """The real model of `ids`."""
        if self.a.model is not None:
            return resolve_model(self.a.model)
        try:
            return resolve_model("smollm2")
        except ModelError:
            return None

    def key(self, part: Part) -> str:
        """See `settings`."""
        more = f"{self.a.device} {self.threads}"
        if part.name == "ids" and self.model is not None:
            more += f" {read_manifest(self.model).digest}"
        return settings(part, more)

    def written(self, part: Part) -> bool:
        """Whether the weights of a campaign are there."""
        return isinstance(part, Campaign) and (self.models / f"{part.shape}-{part.layers}" / MANIFEST_FILE).exists()

    def command(self, part: Part, pieces: tuple[str, ...]) -> list[str]:
        """A child that runs these pieces."""
        a = self.a
        words = [sys.executable, "-m", "benchmarks.gpu", "--child", part.name, "--pieces", ",".join(pieces)]
        words += [
            "--device",
            a.device,
            "--threads",
            str(self.threads),
            "--out",
            str(self.out),
            "--model-dir",
            str(self.models),
        ]
        for option in ("layers", "shape_override", "model"):
            value = getattr(a, option)
            if value is not None:
                words += [f"--{option.replace('_', '-')}", str(value)]
        return words

    def child(self, name: str) -> int:
        """In the process of one part."""
        (part,) = (adapted(p, self.a.layers, self.a.shape_override) for p in PARTS if p.name == name)
        job = child.Job(self.a.device, self.threads, self.models, self.model)
        return child.work(
            part, tuple(self.a.pieces.split(",")), self.key(part), job, origin(self.a.device), self.results
        )

    def measure(self, where: Origin) -> Outcome:
        """Part by part."""
        self._begin()
        kernels = self.models / "kernels"
        make_kernels(kernels)
        driver = Driver(self.results, where, self.a.device, self.command, self.key, self.written, kernels)
        return driver.run(self.parts, self.a.budget, self.a.again)

    def _begin(self) -> None:
        """Results that are kept with the code count where others are written, too."""
        kept = RESULTS / FILE
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.results.file.exists() and kept.exists():
            shutil.copyfile(kept, self.results.file)

    def list(self, where: Origin) -> None:
        """For people."""
        for part in PARTS:
            part = adapted(part, self.a.layers, self.a.shape_override)  # noqa: PLW2901
            pieces = self.results.missing(part, self.key(part), where.card)
            mark = "only where named; " if part.optional else ""
            state = told(pieces, *estimate(part, pieces, self.written(part))) if pieces else "complete"
            print(f"{part.name:14}{mark}{part.what}\n{'':14}{state}")

    def report(self, card: str | None) -> None:
        """Print it, and write it and the pictures beside the results."""
        records = [] if card is None else self.results.of(card)
        found = bars.figures(records)
        text = bars.document(found, records)
        if records:
            (self.out / "gpu.md").write_text(text, encoding="utf-8")
            drawn, why = ([], "") if self.a.no_pictures else bars.draw(found, self.out)
            child.note(
                f"wrote {self.out / 'gpu.md'}" + "".join(f", {f.name}" for f in drawn) + (f"; {why}" if why else "")
            )
        print(text, end="")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 where a part failed."""
    try:
        a = _options().parse_args(arguments)
        call = _Run(a)
        if a.child is not None:
            return call.child(a.child)
        if a.report:
            call.report(call.results.latest_card())
            return 0
        where = origin(a.device)
        if a.list:
            call.list(where)
            return 0
        outcome = call.measure(where)
        call.report(where.card)
    except VeriattnError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    for what, names in (
        ("failed", outcome.failed),
        ("left for the next run", outcome.left),
        ("skipped", outcome.skipped),
    ):
        if names:
            child.note(f"{what}: {', '.join(names)}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
