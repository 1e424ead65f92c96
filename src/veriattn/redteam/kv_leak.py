"""What a leaked KV cache gives away: attacks that reconstruct a prompt from the prover's memory and public weights.

The attacker knows the model. (a) `cache`: the prover's keys and values alone. (b) `memory`: also the activations and weight
matrices that the prover works with. Each attack is as strong as could be made simply: exact integers make a dictionary exact.

| attack | sees | idea |
|---|---|---|
| `value_dictionary` | layer 0 values | they depend on the token alone: look the row up |
| `sorted_values` | layer 0 values | the same with each head's entries sorted by size: permutations and signs drop out |
| `norms` | layer 0 values | the same with one number per head: the sum of squares, the diagonal of the Gram matrix |
| `gram` | layer 0 values | each token's inner products with itself and with the first token, which is known |
| `next_token` | first cached layer | guess the next token, run the public model on the prefix, compare sorted values |
| `weights` | (b) projections | match permuted against public rows, undo the permutation, then `value_dictionary` |
| `activations` | (b) input of the first linear | the normed embedding is the token: look the row up |
| `next_activation` | (b) input of the first outsourced linear | guess the next token, run the public model, compare |

The two that guess try the public model's best guesses only; how often the true token is among them is counted beside, since
exact integers make a comparison right whenever it can be made. What is left once a sequence has ended is looked for in all
of an honest prover's writable memory (`leftovers`), beside a prover that overwrites pages of the cache only.

Sources: KV-Shield (2409.04040), Hidden No More (2505.18332), Shadow in the Cache (2508.09442).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.errors import InternalError, UsageError
from veriattn.native import kernels
from veriattn.redteam.public_model import PublicModel
from veriattn.redteam.search import found
from veriattn.spec.reference import I8

Array = np.ndarray[Any, Any]
Progress = Callable[[str, int, int], None]

#: Conversations of the campaign: shield mode and layers that stay in the TEE.
CASES: tuple[tuple[str, str, int], ...] = (
    ("off", "off", 0),
    ("static", "static", 0),
    ("session", "session", 0),
    ("session+2", "session", 2),
)
ATTACKS_ON_CACHE = ("value_dictionary", "sorted_values", "norms", "gram", "next_token")
ATTACKS_ON_MEMORY = ("weights", "activations", "next_activation")
#: Tokens per prompt that `next_token` is tried on, and candidates per token: the public model's own best guesses.
NEXT_TOKENS = 16
CANDIDATES = 256
#: Conversations after which all of the prover's memory is searched.
ENDED_PROMPTS = 5


@dataclass
class Score:
    """Tokens tried and recovered. among_guesses: of those tried, where the true token was tried; None without guesses."""

    tokens: int = 0
    recovered: int = 0
    among_guesses: int | None = None

    def add(self, other: Score) -> None:
        self.tokens += other.tokens
        self.recovered += other.recovered
        if other.among_guesses is not None:
            self.among_guesses = (self.among_guesses or 0) + other.among_guesses

    def to_json(self) -> dict[str, float | int | None]:
        rate = self.recovered / self.tokens if self.tokens else None
        fields: dict[str, float | int | None] = {"tokens": self.tokens, "recovered": self.recovered, "rate": rate}
        return fields if self.among_guesses is None else {**fields, "among_guesses": self.among_guesses}


@dataclass
class Leak:
    """What was dumped of one conversation."""

    cache: dict[str, Array]
    seen: dict[str, Array]
    left_bytes: int


@dataclass
class CaseResult:
    """One shield setting over all prompts."""

    scores: dict[str, Score] = field(default_factory=dict)
    left_bytes: int = 0
    shield_active: bool = True


def rows_by_bytes(rows: Array) -> dict[bytes, list[int]]:
    """Index rows by their bytes; equal rows share an entry."""
    table: dict[bytes, list[int]] = {}
    for i, row in enumerate(np.ascontiguousarray(rows)):
        table.setdefault(row.tobytes(), []).append(i)
    return table


def look_up(table: dict[bytes, list[int]], rows: Array, prior: npt.NDArray[np.int64]) -> list[int | None]:
    """The token of each row, the most common one where several share a row; None where there is none."""
    out: list[int | None] = []
    for row in np.ascontiguousarray(rows):
        found = table.get(row.tobytes())
        out.append(None if found is None else max(found, key=lambda t: prior[t]))
    return out


def sorted_sizes(v_i8: I8) -> I8:
    """Per head, entries by size: what permutations and signs within a head leave. Shapes: (rows, kv_heads, d) -> same."""
    return np.sort(np.abs(v_i8), axis=2)


def square_sums(v_i8: I8) -> npt.NDArray[np.int32]:
    """Per head, the sum of squares. Shapes: (rows, kv_heads, d) -> (rows, kv_heads)."""
    sums: npt.NDArray[np.int32] = np.sum(v_i8.astype(np.int32) ** 2, axis=2, dtype=np.int32)
    return sums


class Attacker:
    """Public knowledge, prepared once: layer-0 values and normed embeddings of the whole vocabulary."""

    def __init__(self, model: PublicModel) -> None:
        self._model = model
        self._values = model.layer0_values()
        self._prior = np.zeros(self._values.shape[0], np.int64)
        self._exact = rows_by_bytes(self._values)
        self._sorted = rows_by_bytes(sorted_sizes(self._values))
        self._norms = rows_by_bytes(square_sums(self._values))
        self._embedded = rows_by_bytes(model.layer0_inputs())
        self._guesses: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}

    def _candidates(self, known: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """The same for every setting and attack."""
        if known not in self._guesses:
            self._guesses[known] = self._model.candidates(known, CANDIDATES)
        return self._guesses[known]

    def run(self, attack: str, leak: Leak, prompt: Sequence[int]) -> Score:
        """One attack on one conversation's prompt."""
        cache = leak.cache
        values = cache.get("0.v")
        if attack in ("value_dictionary", "sorted_values", "norms"):
            if values is None:
                return Score(len(prompt), 0)
            view, table = {
                "value_dictionary": (values, self._exact),
                "sorted_values": (sorted_sizes(values), self._sorted),
                "norms": (square_sums(values), self._norms),
            }[attack]
            return self._score(look_up(table, view[: len(prompt)], self._prior), prompt)
        if attack == "gram":
            return self._by_gram(values, prompt)
        if attack == "weights":
            return self._by_weights(leak, prompt)
        if attack == "activations":
            seen = leak.seen.get("input.layers.0.qkv")
            found = look_up(self._embedded, seen[: len(prompt)], self._prior) if seen is not None else []
            return self._score(found, prompt)
        if attack == "next_activation":
            return self._next_activation(leak, prompt)
        return self._next_token(leak, prompt)

    @staticmethod
    def _score(found: Sequence[int | None], prompt: Sequence[int]) -> Score:
        return Score(len(prompt), sum(f == t for f, t in zip(found, prompt, strict=False)))

    def _by_gram(self, values: Array | None, prompt: Sequence[int]) -> Score:
        """Inner products per head, with the row itself and with the row of a known token: what the scores' algebra keeps."""
        score = Score(len(prompt) - 1, 0)
        if values is None:
            return score

        def products(rows: Array, first: Array) -> Array:
            wide = rows.astype(np.int32)
            return np.concatenate([(wide * wide).sum(axis=2), (wide * first.astype(np.int32)).sum(axis=2)], axis=1)

        table = rows_by_bytes(products(self._values, self._values[prompt[0]]))
        found = look_up(table, products(values[1 : len(prompt)], values[0]), self._prior)
        score.recovered = sum(f == t for f, t in zip(found, prompt[1:], strict=True))
        return score

    def _by_weights(self, leak: Leak, prompt: Sequence[int]) -> Score:
        """Undo the permutation of v that the prover's projection gives away."""
        values, matrix = leak.cache.get("0.v"), leak.seen.get("weight.layers.0.qkv")
        if values is None:
            return Score(len(prompt), 0)
        if matrix is not None:
            order = self._model.match_value_rows(matrix)
            restored = np.empty_like(values)
            for head in range(values.shape[1]):
                restored[:, head, order[head]] = values[:, head]
            values = restored
        return self._score(look_up(self._exact, values[: len(prompt)], self._prior), prompt)

    def _next_token(self, leak: Leak, prompt: Sequence[int]) -> Score:
        """Of the public model's best guesses, the one whose sorted values are those in the first cached layer."""
        layers = sorted(int(name.split(".")[0]) for name in leak.cache if name.endswith(".v"))
        if not layers:
            return Score(min(NEXT_TOKENS, len(prompt)), 0)
        layer = layers[0]
        target = sorted_sizes(leak.cache[f"{layer}.v"])

        def values(known: list[int], candidates: npt.NDArray[np.int64]) -> Array:
            return sorted_sizes(self._model.values_of_next(known, candidates, layer))

        return self._guess(prompt, target, values)

    def _next_activation(self, leak: Leak, prompt: Sequence[int]) -> Score:
        """Of the public model's best guesses, the one whose input of the first outsourced linear is the one seen."""
        names = [f"layers.{i}.{part}" for i in range(3) for part in ("qkv", "o", "gate_up", "down")]
        seen = [name for name in names if f"input.{name}" in leak.seen]
        if not seen:
            return Score(min(NEXT_TOKENS, len(prompt)), 0)
        return self._guess(
            prompt, leak.seen[f"input.{seen[0]}"], lambda known, ids: self._model.inputs_of_next(known, ids, seen[0])
        )

    def _guess(
        self, prompt: Sequence[int], target: Array, look: Callable[[list[int], npt.NDArray[np.int64]], Array]
    ) -> Score:
        """Token by token after the first, which is given. A token that is not among the candidates counts as not recovered
        and is given to the attacker, so that every position is a fair trial."""
        score = Score(min(NEXT_TOKENS, len(prompt) - 1), 0, 0)
        known: list[int] = [prompt[0]]
        for position in range(1, score.tokens + 1):
            candidates = self._candidates(tuple(known))
            score.among_guesses = (score.among_guesses or 0) + int(prompt[position] in candidates)
            rows = look(known, candidates)
            hit = np.flatnonzero((rows == target[position]).reshape(len(rows), -1).all(axis=1))
            found = int(candidates[hit[0]]) if hit.size else None
            score.recovered += found == prompt[position]
            known.append(prompt[position])
        return score


def prompts_of(text: str, encode: Callable[[str], list[int]], count: int) -> list[tuple[int, ...]]:
    """Cut real text into prompts of 64 to 256 tokens. Raises: UsageError where it is too short."""
    ids = encode(text)
    sizes = [64 + (i * 37) % 193 for i in range(count)]
    if len(ids) < sum(sizes):
        raise UsageError(
            f"{count} prompts need {sum(sizes)} tokens of text, there are {len(ids)}", hint="give a longer --text file"
        )
    out, at = [], 0
    for size in sizes:
        out.append(tuple(ids[at : at + size]))
        at += size
    return out


def leak_of(
    model: Path, prompt: tuple[int, ...], mode: str, own_layers: int, directory: Path
) -> tuple[Leak, list[int]]:
    """Run one conversation on a prover whose memory leaks, and read the dump."""
    for old in directory.iterdir():
        old.unlink()
    command = (sys.executable, "-m", "veriattn.redteam.leaky", str(directory))
    config = EngineConfig(
        strategy="veriattn",
        prover_command=command,
        kv_shield=mode,  # type: ignore[arg-type]
        shield_first_layers=own_layers,
        max_sequences=1,
    )
    with Engine(model, config) as engine:
        state = engine.generate([Request(prompt, max_tokens=4, ignore_eos=True)])[0]
        after = directory / "after-0.json"
        _wait_for(after)
        left = int(json.loads(after.read_text())["nonzero_cache_bytes"])
        with np.load(directory / "kv-0.npz", allow_pickle=False) as kv:
            cache = {name: kv[name] for name in kv.files}
        with np.load(directory / "seen-0.npz", allow_pickle=False) as parts:
            seen = {name: parts[name] for name in parts.files}
    return Leak(cache, seen, left), state.output_ids


def after_end(
    model: Path, public: PublicModel, prompts: Sequence[tuple[int, ...]], directory: Path
) -> dict[str, dict[str, int]]:
    """Rows of the last layer (keys, values, input and product of its last linear, the latest that a prefill leaves) that
    stand anywhere in a prover's writable memory once the conversation has ended."""
    out = {}
    for name, options in (("overwritten", ()), ("pages_only", ("--keep",))):
        count = {"rows": 0, "found": 0}
        for prompt in prompts:
            for old in directory.iterdir():
                old.unlink()
            command = (sys.executable, "-m", "veriattn.redteam.leftovers", *options, str(directory))
            config = EngineConfig(strategy="veriattn", prover_command=command, max_sequences=1)
            path = directory / "memory-0.bin"
            with Engine(model, config) as engine:
                engine.generate([Request(prompt, max_tokens=1, ignore_eos=True)])
                _wait_for(path)
            starts = [np.ascontiguousarray(rows).view(np.uint8)[:, :16] for rows in public.last_layer(prompt)]
            hits = found(path, np.ascontiguousarray(np.concatenate(starts)).view(np.uint64))
            count["rows"] += len(hits)
            count["found"] += int(np.count_nonzero(hits))
        out[name] = count
    return out


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120.0
    while not path.exists():
        if time.monotonic() > deadline:
            raise InternalError("the leaky prover wrote no dump")
        time.sleep(0.01)


def run(model: Path, text: str, count: int = 20, progress: Progress | None = None) -> dict[str, Any]:
    """All attacks on all shield settings. Returns per setting and attack the recovered share, and what is left after FREE.

    Raises: UsageError for too little text; ProverFault and below.
    """
    public = PublicModel(model, kernels)
    attacker = Attacker(public)
    prompts = prompts_of(text, public.encode, count)
    results: dict[str, CaseResult] = {}
    answers: dict[int, list[int]] = {}
    same_tokens = True
    with tempfile.TemporaryDirectory(prefix="veriattn-leak-") as scratch:
        directory = Path(scratch)
        directory.chmod(0o777)
        for name, mode, own_layers in CASES:
            case = results[name] = CaseResult()
            for i, prompt in enumerate(prompts):
                leak, output = leak_of(model, prompt, mode, own_layers, directory)
                same_tokens &= answers.setdefault(i, output) == output
                case.left_bytes += leak.left_bytes
                case.shield_active &= _scrambled(public, leak, prompt) == (mode != "off")
                for attack in (*ATTACKS_ON_CACHE, *ATTACKS_ON_MEMORY):
                    score = attacker.run(attack, leak, prompt)
                    case.scores.setdefault(attack, Score()).add(score)
                if progress is not None:
                    progress(name, i + 1, len(prompts))
        ended = after_end(model, public, prompts[:ENDED_PROMPTS], directory)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "same_tokens": same_tokens,
        "after_end": ended,
        "cases": {
            name: {
                "shield_as_set": case.shield_active,
                "left_after_free_bytes": case.left_bytes,
                "cache": {a: case.scores[a].to_json() for a in ATTACKS_ON_CACHE},
                "memory": {a: case.scores[a].to_json() for a in ATTACKS_ON_MEMORY},
            }
            for name, case in results.items()
        },
    }


def _scrambled(public: PublicModel, leak: Leak, prompt: tuple[int, ...]) -> bool:
    """Whether the first cached layer holds something else than the model's own values for this prompt."""
    layers = sorted(int(name.split(".")[0]) for name in leak.cache if name.endswith(".v"))
    if not layers:
        return True
    expected = public.cached_values(prompt, layers[0])
    return not np.array_equal(leak.cache[f"{layers[0]}.v"][: len(prompt)], expected)
