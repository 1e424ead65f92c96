"""Where results go: JSON with the machine they come from, and a plot where matplotlib is installed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from veriattn import doctor

Plot = Callable[[dict[str, Any], Any], None]


def write(out: Path, name: str, data: dict[str, Any], plot: Plot) -> dict[str, Any]:
    """Write OUT/NAME.json and OUT/NAME.png; the data with the paths and the machine."""
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "name": name,
        "machine": {**doctor.origin(), "python": platform.python_version(), "numpy": np.__version__},
        **data,
    }
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
