"""The file of results: one JSON object a line for each piece of a part, with the code and the machine that it is of."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Part
from veriattn import doctor
from veriattn.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """source: a hash of the code that is measured (a commit may be unknown where the tree is a copy, and changes with a
    document). card: the GPU's name, or the CPU's where that is the prover."""

    source: str
    card: str
    machine: dict[str, Any]

    def header(self) -> Record:
        """The beginning of every record."""
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "source": self.source, "card": self.card,
            **self.machine,
        }  # fmt: skip


def origin(device: str) -> Origin:
    """Of this tree on this machine."""
    machine = doctor.origin()
    return Origin(source_digest(), machine["cpu"] if device == "cpu" else _card(machine), machine)


def _card(machine: dict[str, Any]) -> str:
    for found in machine["gpu"]["devices"]:
        return str(found["name"])
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if model := re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE):
            return model[1].strip()
    return "a GPU"


def source_digest(root: Path = ROOT) -> str:
    """In short: everything that computes, neither tests nor documents."""
    files = [*(root / "src").rglob("*.py"), *(root / "native").glob("*"), root / "CMakeLists.txt"]
    whole = hashlib.sha256()
    for file in sorted(f for f in files if f.is_file()):
        whole.update(f"{file.relative_to(root)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:12]


class Results:
    """A file that is only ever appended to. sources: those whose records count."""

    def __init__(self, file: Path, sources: Sequence[str]) -> None:
        self.file, self.sources = file, tuple(sources)

    def append(self, record: Record) -> None:
        """In one write, so that who is ended leaves whole lines. Raises: UsageError."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {self.file}: {error.strerror}", hint="--out DIR") from error

    def all(self) -> Iterator[Record]:
        """Whatever is there; a line that was cut off is left out."""
        if not self.file.exists():
            return
        for text in self.file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue

    def of(self, card: str) -> list[Record]:
        """Those that count on a card, in the order in which they came."""
        return [r for r in self.all() if r["source"] in self.sources and r["card"] == card]

    def latest_card(self) -> str | None:
        """The card of the last record that counts."""
        cards = [str(r["card"]) for r in self.all() if r["source"] in self.sources]
        return cards[-1] if cards else None

    def missing(self, part: Part, key: str, card: str) -> tuple[str, ...]:
        """Pieces of a part that are not there under these settings."""
        done = {
            r["piece"] for r in self.of(card) if (r["part"], r["settings"], r["status"]) == (part.name, key, "done")
        }
        return tuple(piece for piece in part.pieces if piece not in done)
