"""Canonical models on the prover's side, found by their digest: the verifier names what it wants, not where it lies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from veriattn.errors import ModelError
from veriattn.spec.modelfile import read_manifest


class ModelFinder:
    """Looks for a digest in directories that are models or hold models.

    Nothing of a request becomes a path, so that whoever reaches a listening prover cannot make it open files.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = tuple(directories)

    def find(self, digest: str) -> Path:
        """The directory of that model. Looks anew each time. Raises: ModelError."""
        for path in self._candidates():
            try:
                if read_manifest(path).digest == digest:
                    return path
            except ModelError:
                continue
        raise ModelError(f"this prover has no model {digest}", hint="give its directory to the prover with --model-dir")

    def _candidates(self) -> list[Path]:
        found = []
        for directory in self._directories:
            found.append(directory)
            if directory.is_dir():
                found.extend(sorted(p for p in directory.iterdir() if p.is_dir()))
        return found
