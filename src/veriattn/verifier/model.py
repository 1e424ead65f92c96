"""The verifier's share of a model: public tensors and keys, from one hashed pass over the weights."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from veriattn.errors import InternalError
from veriattn.native import project_weights
from veriattn.spec.model import ModelTensors
from veriattn.spec.modelfile import Manifest, ModelDirectory, TensorCollector
from veriattn.verifier.isolation import harden_self, lock_memory
from veriattn.verifier.keys import REPETITIONS, KeySet

#: Key sets made in one pass: one to use and one spare, so that a reject does not mean reading the weights again.
KEY_SETS_PER_PASS = 2


class VerifierModel:
    """Everything the verifier keeps of a model: configuration, scales, embeddings, tables and unused key sets.

    Trust: the directory is untrusted. `u = W^T r` is computed from the same private bytes that are hashed, and nothing of
    a pass is used before all hashes have matched. Later passes must find the very digest of the first.

    Raises: ModelError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expected_digest: str | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        # Secrets are about to exist: from here on no other process of this user may read our memory, and no core is dumped.
        harden_self()
        self._path = Path(path)
        self._lock = threading.Lock()
        directory = ModelDirectory(path, expected_digest=expected_digest)
        self.manifest: Manifest = directory.manifest
        self.tokenizer_json = directory.tokenizer_json()
        self.chat_template = directory.chat_template()
        self.tensors, self._key_sets = self._pass(directory, on_bytes)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def _pass(
        self, directory: ModelDirectory, on_bytes: Callable[[int], None] | None
    ) -> tuple[ModelTensors, list[KeySet]]:
        key_sets = [KeySet(directory.config) for _ in range(KEY_SETS_PER_PASS)]
        try:
            return self._project(directory, key_sets, on_bytes), key_sets
        except BaseException:
            for keys in key_sets:
                keys.destroy()
            raise

    @staticmethod
    def _project(
        directory: ModelDirectory, key_sets: list[KeySet], on_bytes: Callable[[int], None] | None
    ) -> ModelTensors:
        """Complete the key sets from one hashed pass over the weights."""
        config = directory.config
        collector = TensorCollector(config)
        name_of = {f"{name}.weight": name for name in config.linear_shapes()}
        r_all = u_all = np.empty((0, 0), np.uint64)
        for tensor, first, chunk in directory.stream(on_bytes=on_bytes):
            if collector.add(tensor, first, chunk):
                continue
            name = name_of[tensor]
            pairs = [keys.linear(name) for keys in key_sets]
            if first == 0:
                r_all = np.concatenate([r for r, _ in pairs])
                u_all = np.zeros((len(pairs) * REPETITIONS, chunk.shape[1]), np.uint64)
            project_weights(chunk, np.ascontiguousarray(r_all[:, first : first + chunk.shape[0]]), u_all)
            if first + chunk.shape[0] == r_all.shape[1]:
                for i, (_, u) in enumerate(pairs):
                    u[...] = u_all[i * REPETITIONS : (i + 1) * REPETITIONS]
                r_all[...] = 0
                u_all[...] = 0
        for keys in key_sets:
            for array in keys.secret_arrays():
                lock_memory(array)
        return collector.tensors()

    def take_keys(self) -> KeySet:
        """A key set that no session has used. Reads the weights again when the spares are gone. Raises: ModelError."""
        with self._lock:
            if not self._key_sets:
                directory = ModelDirectory(self._path, expected_digest=self.digest)
                _, self._key_sets = self._pass(directory, None)
            if not self._key_sets:
                raise InternalError("a pass over the weights made no keys")
            return self._key_sets.pop()

    @property
    def nbytes(self) -> int:
        """Memory of public tensors and unused keys."""
        t = self.tensors
        public = t.embed_f16.nbytes + t.rope_cos.nbytes + t.rope_sin.nbytes + t.lm_head_scale.nbytes
        for layer in t.layers:
            public += sum(v.nbytes for v in vars(layer).values() if v is not None)
        return public + sum(k.nbytes for k in self._key_sets)
