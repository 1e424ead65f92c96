"""Pictures of measurements, SVG and PNG. matplotlib is an extra, imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veriattn.bench.report import Conditions, Point
from veriattn.errors import ConfigError, UsageError

_COLOURS = {
    "run-ahead": "#1b6ca8", "veriattn": "#2a9d5c", "tsdp": "#d1772b", "full-tee": "#8a4fa3", "dangerous-unverified": "#888888",
}  # fmt: skip
_SHADES = ("#1b6ca8", "#2a9d5c", "#d1772b", "#8a4fa3", "#555555", "#c23b5a")


def _pyplot() -> Any:
    try:
        import matplotlib  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("pictures need matplotlib", hint="pip install 'veriattn[bench]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "veriattn", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def check(path: Path) -> None:
    """Fail before anything is measured. Raises: ConfigError without matplotlib; UsageError for a path that cannot be."""
    _pyplot()
    if not path.absolute().parent.is_dir():
        raise UsageError(f"no directory {path.parent} for the plot")


def draw(path: Path, conditions: Conditions, points: Sequence[Point]) -> tuple[Path, Path]:
    """Write PATH's .svg and .png: time over length, or over the offload ratio where there are several. Returns both."""
    plt = _pyplot()
    ratios = {p.ratio for p in points}
    figure = _ratios(plt, points) if len(ratios) > 1 else _lengths(plt, conditions, points)
    figure.suptitle(conditions.title, fontsize=8)
    files = path.with_suffix(".svg"), path.with_suffix(".png")
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=140, metadata=metadata)
    plt.close(figure)
    return files


def _panels(plt: Any, count: int) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 3.6), squeeze=False, layout="constrained")
    for ax in axes[0]:
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return figure, list(axes[0])


def _lengths(plt: Any, conditions: Conditions, points: Sequence[Point]) -> Any:
    batches = sorted({p.batch for p in points})
    figure, axes = _panels(plt, len(batches))
    for ax, batch in zip(axes, batches, strict=True):
        for strategy in dict.fromkeys(p.strategy for p in points):
            here = sorted((p for p in points if (p.strategy, p.batch) == (strategy, batch)), key=lambda p: p.length)
            x, colour = [p.length for p in here], _COLOURS.get(strategy)
            ax.plot(x, [p.seconds for p in here], "o-", ms=4, lw=1.6, color=colour, label=strategy)
            ax.plot(x, [p.floor.seconds for p in here], ":", lw=1.2, color=colour)
        ax.set_title(f"batch {batch} (dotted: computed floor)", fontsize=9)
        ax.set_xlabel("tokens in the prompt" if conditions.phase == "prefill" else "tokens in the cache")
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("time to first token, s" if conditions.phase == "prefill" else "time per token, s")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _ratios(plt: Any, points: Sequence[Point]) -> Any:
    batches = sorted({p.batch for p in points})
    figure, axes = _panels(plt, len(batches))
    for ax, batch in zip(axes, batches, strict=True):
        lines = dict.fromkeys((p.strategy, p.length) for p in points if p.batch == batch)
        for (strategy, length), colour in zip(lines, _SHADES * len(lines), strict=False):
            here = [p for p in points if (p.strategy, p.length, p.batch) == (strategy, length, batch)]
            fixed = sorted((p for p in here if p.ratio != "auto"), key=lambda p: float(p.ratio or 0.0))
            label = f"{length} keys, {strategy}"
            ax.plot([float(p.ratio or 0.0) for p in fixed], [1e3 * p.seconds for p in fixed], "o-", ms=4, lw=1.6,
                    color=colour, label=label)  # fmt: skip
            for p in here:
                if p.ratio == "auto" and p.sample.ratio is not None:
                    ax.plot([p.sample.ratio], [1e3 * p.seconds], "*", ms=12, color=colour, mec="black", mew=0.6)
        ax.set_title(f"batch {batch} (star: adaptive)", fontsize=9)
        ax.set_xlabel("offload ratio p")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("time per step, ms")
    return figure
