"""Draw a stretch of traces (`generate --trace`) as bars, one above the other: `trace_picture.py OUT.png TITLE=FILE...`.

Needs matplotlib (the `bench` extra). `--layers A-B` picks the layers; each trace starts with the first check of layer A.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = {
    "compute": "#3b6fb6",
    "send": "#9cc3e6",
    "check": "#2f9e44",
    "replay": "#a3d9a5",
    "copy-in": "#f2b134",
    "to prover": "#b07cc6",
    "from prover": "#b07cc6",
}
TRACKS = ("prover", "link to prover", "link from prover", "verifier")


def stretch(path: Path, first: int, last: int) -> tuple[dict[str, list[tuple[float, float, str]]], float]:
    """Per track (start ms, length ms, kind) of layers first..last, and the length of the stretch."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X" and names[e["tid"]] in TRACKS and e["cat"] in COLOURS]
    mine = [e for e in spans if names[e["tid"]] == "verifier" and first <= e.get("args", {}).get("layer", -1) <= last]
    # Of the longest step: the others are decoding.
    steps = [e for e in events if e["ph"] == "X" and e["cat"] == "step"]
    step = max(steps, key=lambda e: e["dur"])
    mine = [e for e in mine if step["ts"] <= e["ts"] < step["ts"] + step["dur"]]
    begin, end = min(e["ts"] for e in mine), max(e["ts"] + e["dur"] for e in mine)
    tracks: dict[str, list[tuple[float, float, str]]] = {t: [] for t in TRACKS}
    for e in spans:
        start, stop = max(e["ts"], begin), min(e["ts"] + e["dur"], end)
        if stop > start:
            tracks[names[e["tid"]]].append(((start - begin) / 1e3, (stop - start) / 1e3, e["cat"]))
    return tracks, (end - begin) / 1e3


def main() -> None:
    """Command line."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("traces", nargs="+", metavar="TITLE=FILE")
    parser.add_argument("--layers", default="10-10", metavar="A-B")
    options = parser.parse_args()
    first, last = map(int, options.layers.split("-"))
    parts = [
        (title, *stretch(Path(file), first, last)) for title, _, file in (t.rpartition("=") for t in options.traces)
    ]
    figure, axes = plt.subplots(len(parts), 1, figsize=(11, 2.1 * len(parts) + 0.6), sharex=True, squeeze=False)
    for axis, (title, tracks, length) in zip(axes[:, 0], parts, strict=True):
        for y, track in enumerate(reversed(TRACKS)):
            for kind, colour in COLOURS.items():
                bars = [(start, width) for start, width, k in tracks[track] if k == kind]
                axis.broken_barh(bars, (y + 0.1, 0.8), facecolors=colour, linewidth=0)
        axis.set_yticks([y + 0.5 for y in range(len(TRACKS))], list(reversed(TRACKS)))
        axis.set_title(f"{title}: {length:.1f} ms", loc="left", fontsize=10)
        axis.set_xlim(0, max(length for _, _, length in parts))
    axes[-1, 0].set_xlabel("milliseconds; the link is emulated")
    shown = {kind: colour for kind, colour in COLOURS.items() if kind != "to prover"} | {
        "from prover": COLOURS["from prover"]
    }
    labels = {"from prover": "transfer (emulated)", "replay": "replay (elementwise)"}
    handles = [Patch(color=colour, label=labels.get(kind, kind)) for kind, colour in shown.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="upper center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
