"""Where state lives: `$VERIATTN_HOME`, else the XDG cache directory, with models, their sources and locks below it."""

from __future__ import annotations

import os
from pathlib import Path

from veriattn.errors import ModelError


def state_directory() -> Path:
    """`$VERIATTN_HOME`, else `$XDG_CACHE_HOME/veriattn`, else `~/.cache/veriattn`. It may not exist yet."""
    own = os.environ.get("VERIATTN_HOME")
    if own:
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "veriattn"


def models_directory(home: Path | None = None) -> Path:
    """Where pulled models live, one directory each."""
    return (home or state_directory()) / "models"


def sources_directory(home: Path | None = None) -> Path:
    """Where the float checkpoints of pulled models live, named by their SHA-256."""
    return (home or state_directory()) / "sources"


def resolve_model(name_or_path: str, home: Path | None = None) -> Path:
    """The directory of a model given by path or by a pulled name; a path wins where both exist.

    Raises: ModelError if there is neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    is_name = os.sep not in name_or_path and name_or_path not in ("", ".", "..")
    if is_name and (pulled := models_directory(home) / name_or_path).is_dir():
        return pulled
    if path.exists():
        raise ModelError(
            f"{path} is a file, not a model directory",
            hint="`veriattn convert` makes a model directory from a checkpoint",
        )
    where = f" and {models_directory(home)} has none of that name" if is_name else ""
    raise ModelError(
        f"there is no model {name_or_path!r}: no such directory{where}",
        hint="`veriattn pull smollm2` fetches the demo model; `veriattn convert` makes one from a checkpoint",
    )
