"""What the paper measured, measured here, and attacks on its tolerances: each writes a JSON file and a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veriattn.convert.sources import open_source
from veriattn.errors import UsageError
from veriattn.floatmode.engine import FloatModel
from veriattn.floatmode.reproduce import attacks, exact_twins, lemmas, published, table1, table2, underflow
from veriattn.floatmode.reproduce.report import write


def run(
    what: str,
    out: Path,
    *,
    source: Path | None = None,
    exact_model: Path | None = None,
    trials: int = 1000,
    text: str = "",
    note: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """One reproduction; returns what was written to `out`/`what`.json. Raises: UsageError, ModelError.

    what: table1, table2, lemmas, underflow, attacks, published.
    """
    needs_nothing = what in ("lemmas", "published")
    if source is None and not needs_nothing:
        raise UsageError(f"{what} needs a float checkpoint", hint="-m NAME_OR_FILE")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the directory {out}: {error.strerror}", hint="name another") from error
    if needs_nothing or source is None:
        module = lemmas if what == "lemmas" else published
        return write(out, what, module.measure(trials), module.plot)
    model = FloatModel(open_source(source))
    if what == "table1":
        return write(out, what, table1.measure(model, text, trials, note), table1.plot)
    if what == "table2":
        return write(out, what, table2.measure(model, text, note), table2.plot)
    if what == "underflow":
        return write(out, what, underflow.measure(model, text, trials), underflow.plot)
    result = attacks.measure(model, text, note)
    if exact_model is not None:
        result["exact"] = exact_twins.measure(exact_model, trials, note)
    return write(out, what, result, attacks.plot)
