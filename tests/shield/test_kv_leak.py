"""The attacks themselves, on a tiny model: what each recovers, and that what it cannot recover is not counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers import Bits, make_model

from veriattn.errors import UsageError
from veriattn.native import kernels
from veriattn.redteam import kv_leak
from veriattn.redteam.kv_leak import Attacker, Leak, prompts_of, run
from veriattn.redteam.public_model import PublicModel

TEXT = "".join(chr(97 + int(c)) for c in Bits("leak").integers(0, 25, 400))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("leak") / "tiny"
    make_model(path, hidden_size=128, head_dim=64, rotary_dim=32, intermediate_size=192, num_layers=3)
    return path


def test_campaign(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_leak, "NEXT_TOKENS", 4)
    result = run(tiny, TEXT, 1)
    assert (result["prompts"], result["prompt_tokens"], result["same_tokens"]) == (1, 64, True)
    rates = {
        name: {attack: score["rate"] for attack, score in {**case["cache"], **case["memory"]}.items()}
        for name, case in result["cases"].items()
    }
    for name, case in result["cases"].items():
        assert case["shield_as_set"] and case["left_after_free_bytes"] == 0, name
        for where, attack in (("cache", "next_token"), ("memory", "next_activation")):
            score = case[where][attack]
            assert score["recovered"] == score["among_guesses"] <= score["tokens"] == 4
    assert set(rates["off"].values()) - {rates["off"]["next_token"]} == {1.0}
    for mode in ("static", "session"):
        assert rates[mode]["value_dictionary"] == 0.0
        assert rates[mode]["sorted_values"] == rates[mode]["norms"] == rates[mode]["gram"] == 1.0
        assert rates[mode]["activations"] == 1.0
    assert (rates["static"]["weights"], rates["session"]["weights"]) == (1.0, 0.0)
    ended = rates["session+2"]
    assert not any(ended[attack] for attack in ended if not attack.startswith("next_"))
    assert result["after_end"]["overwritten"] == {"rows": 4 * 64, "found": 0}
    assert result["after_end"]["pages_only"]["found"] >= 64


def test_guessing_recovers_nothing_from_another_prompts_cache(tiny: Path) -> None:
    """The dump alone decides: with rows of other tokens in it, the true tokens are not found though they are guessed."""
    public = PublicModel(tiny, kernels)
    attacker = Attacker(public)
    prompt, other = tuple(range(10, 30)), tuple(range(40, 60))
    for layer in (0, 1):
        right = Leak({f"{layer}.v": public.cached_values(prompt, layer)}, {}, 0)
        wrong = Leak({f"{layer}.v": public.cached_values(other, layer)}, {}, 0)
        hit, miss = attacker.run("next_token", right, prompt), attacker.run("next_token", wrong, prompt)
        assert hit.recovered == hit.among_guesses == miss.among_guesses
        assert hit.recovered > 5 and miss.recovered == 0


def test_permuted_and_signed_values_look_the_same_to_order_free_attacks_only(tiny: Path) -> None:
    public = PublicModel(tiny, kernels)
    attacker, rng = Attacker(public), np.random.default_rng(3)
    prompt = tuple(int(t) for t in rng.integers(4, 250, 40))
    values = public.cached_values(prompt, 0)
    order, sign = rng.permutation(64), rng.choice(np.array([-1, 1], np.int8), 64)
    leak = Leak({"0.v": values[:, :, order] * sign}, {}, 0)
    recovered = {a: attacker.run(a, leak, prompt).recovered for a in ("value_dictionary", "sorted_values", "norms")}
    assert recovered == {"value_dictionary": 0, "sorted_values": 40, "norms": 40}
    assert attacker.run("gram", leak, prompt).recovered == 39  # the first token is known
    # Another permutation for each row, as no shield does it, would leave norms alone.
    each = np.stack([row[:, rng.permutation(64)] for row in values])
    assert attacker.run("gram", Leak({"0.v": each}, {}, 0), prompt).recovered == 0


def test_too_little_text() -> None:
    with pytest.raises(UsageError, match="tokens of text"):
        prompts_of("short", lambda text: list(text.encode()), 2)
