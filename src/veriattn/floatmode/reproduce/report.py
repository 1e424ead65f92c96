"""Where results go: JSON with the machine they come from, and a plot where matplotlib is installed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import veriattn
from veriattn import native

Plot = Callable[[dict[str, Any], Any], None]


def machine() -> dict[str, Any]:
    """CPU, cores, threads and versions."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        name = platform.machine()
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "isa": native.active_isa(),
        "gpu": None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "veriattn": veriattn.__version__,
    }


def write(out: Path, name: str, data: dict[str, Any], plot: Plot) -> dict[str, Any]:
    """Write OUT/NAME.json and OUT/NAME.png; the data with the paths and the machine."""
    out.mkdir(parents=True, exist_ok=True)
    data = {"name": name, "machine": machine(), **data}
    picture = out / f"{name}.png"
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        data["plot"] = None
    else:
        mpl.use("Agg")
        import matplotlib.pyplot as plt  # noqa: PLC0415

        plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        figure = plt.figure(figsize=(8, 4))
        plot(data, figure)
        figure.tight_layout()
        figure.savefig(picture, dpi=130)
        plt.close(figure)
        data["plot"] = str(picture)
    file = out / f"{name}.json"
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return {**data, "file": str(file)}
