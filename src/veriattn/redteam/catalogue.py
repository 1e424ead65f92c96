"""The attacks by name, with the error that each must meet; tests and campaigns run the same list.

Positions refer to the script of `veriattn.redteam.trial`: step 0 prefills sequences 0 and 1, steps 1 and 2 decode both, step 3
decodes sequence 0 and prefills sequence 2 after sequence 1 was freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from veriattn.redteam.attack import Attack
from veriattn.spec.field import P
from veriattn.spec.model import ModelConfig
from veriattn.verifier.session import Flow
from veriattn.wire.messages import AttentionCheck, Kind

OK = "ok"
FREIVALDS, ATTENTION, TRANSCRIPT = "freivalds_mismatch", "attention_mismatch", "transcript_mismatch"
MALFORMED, TIMEOUT, UNAVAILABLE, FAULT = "malformed_message", "prover_timeout", "prover_unavailable", "prover_fault"

REPLAY, TRANSFER = AttentionCheck.REPLAY, AttentionCheck.TRANSFER
SCRIPT_STEPS = 4
HOSTILE_TEXT = "\x1b[2J\x1b]0;owned\x07 ok \u202e\r\nveriattn: verified"


@dataclass(frozen=True)
class Case:
    """An attack and what must become of it.

    codes: the errors allowed ("ok" for what must pass). steps: how many steps may complete (None: any number).
    applied: whether the liar can get its lie out at all; what the system refuses is reported as not applied. limit: keys
    of a sequence that the prover may keep; the others live with the verifier and are streamed.
    """

    name: str
    attack: Attack
    codes: frozenset[str]
    check: AttentionCheck = REPLAY
    steps: int | None = None
    applied: bool = True
    flow: Flow = Flow.RUN_AHEAD
    limit: int | None = None

    @property
    def passes(self) -> bool:
        return OK in self.codes


def _case(name: str, attack: Attack, code: str, check: AttentionCheck = REPLAY, steps: int | None = None) -> Case:
    if steps is None:
        steps = SCRIPT_STEPS if code == OK else attack.step
    return Case(name, attack, frozenset({code}), check, steps)


def claim_kinds(check: AttentionCheck) -> tuple[str, ...]:
    """Kinds of claims in the order of a layer, then lm_head."""
    scores = ("scores",) if check is TRANSFER else ()
    return ("qkv", *scores, "attention", "o", "gate_up", "down", "lm_head")


def claim_name(kind: str, layer: int, seq_id: int = 0) -> str:
    """The name that the backend gives a claim."""
    if kind == "lm_head":
        return kind
    return f"layers.{layer}.scores.{seq_id}" if kind == "scores" else f"layers.{layer}.{kind}"


def code_of(kind: str) -> str:
    """The error that a wrong value in a claim of this kind must meet."""
    return ATTENTION if kind in ("scores", "attention") else FREIVALDS


def value_cases(config: ModelConfig) -> Iterator[Case]:
    """Every fault in every kind of claim, naive and consistent, in the first and the last layer."""
    faults = {
        "bit_0": Attack("fault", fault="bit", index=5, value=0),
        "bit_sign": Attack("fault", fault="bit", index=6, value=-1),
        "plus_one": Attack("fault", fault="add", index=7, value=1),
        "minus_one": Attack("fault", fault="add", index=0, value=-1),
        "plus_2_16": Attack("fault", fault="add", index=1, value=1 << 16),
        "minus_2_30": Attack("fault", fault="add", index=2, value=-(1 << 30)),
        "random_element": Attack("fault", fault="element", index=3, seed=1),
        "last_element": Attack("fault", fault="add", index=-1, value=1),
        "every_element": Attack("fault", fault="every", value=1),
        "zero": Attack("fault", fault="zero"),
        "negate": Attack("fault", fault="negate"),
        "random_tensor": Attack("fault", fault="random", seed=2),
        "row": Attack("fault", fault="row", index=1, value=3),
        "row_scaled": Attack("fault", fault="row_scaled", index=1, value=2),
        "cancelling_pair": Attack("fault", fault="pair", index=0, value=1000),
        "swapped_elements": Attack("fault", fault="swap_elements", index=4),
        "rolled": Attack("fault", fault="roll"),
    }
    last = config.num_layers - 1
    for kind in claim_kinds(TRANSFER):
        check = TRANSFER if kind == "scores" else REPLAY
        for number, (name, attack) in enumerate(faults.items()):
            layer, step = (0, last)[number % 2], (1, 2, 0)[number % 3]
            if kind == "scores":
                step = 1 + number % 2  # decoding: every score is seen
            a = replace(attack, claim=claim_name(kind, layer), step=step, consistent=number % 2 == 0)
            yield _case(f"{name}/{kind}", a, code_of(kind), check)
    for kind in ("qkv", "attention", "o", "gate_up", "down", "lm_head"):
        a = Attack("fault", step=1, claim=claim_name(kind, 0), fault="column_pair", index=3, value=77)
        yield _case(f"cancelling_rows/{kind}", a, code_of(kind))
        a = Attack("fault", step=1, claim=claim_name(kind, last), fault="swap_rows", index=0, value=1)
        yield _case(f"swapped_sequences/{kind}", a, code_of(kind))
    yield _case("logit_bump/lm_head", Attack("fault", step=1, claim="lm_head", fault="bump_to_top", value=7), FREIVALDS)


def attention_cases(config: ModelConfig) -> Iterator[Case]:
    """Field wrap, wrong operands and wrong scores."""
    last = config.num_layers - 1
    here = Attack("fault", step=1, claim=f"layers.{last}.attention", index=9)
    for check in (REPLAY, TRANSFER):
        tag = check.name.lower()
        for times in (1, -1, 2, 1 << 12, -(1 << 13)):
            yield _case(f"p_times_{times}/{tag}", replace(here, fault="add_p", value=times), ATTENTION, check)
        for value in (1 << 39, -(1 << 39), (1 << 39) - 1, 1 << 62, -(1 << 63), (1 << 63) - 1, P, -P, 2**63 // P * P):
            yield _case(f"set_{value}/{tag}", replace(here, fault="set", value=value), ATTENTION, check)
        for row in ("row", "every"):
            yield _case(f"{row}_plus_p/{tag}", replace(here, fault=row, value=P, consistent=True), ATTENTION, check)
        if config.num_heads > 1:
            yield _case(f"swapped_heads/{tag}", replace(here, fault="swap_heads", index=0, value=1), ATTENTION, check)
        for kind, step in _OPERANDS.items():
            if (kind == "wrong_group" and config.num_kv_heads < 2) or (kind == "corrupt_key" and check is TRANSFER):
                continue
            # The newest key decides least; the first is seen by every row.
            a = Attack(kind, step=step, claim=f"layers.{last}.attention")
            yield _case(f"{kind}/{tag}", a, ATTENTION, check)
    scores = Attack("scores", step=2, claim=f"layers.{last}.scores.1")
    for name, fault in {
        "one": replace(scores, fault="add", index=3, value=1),
        "pair": replace(scores, fault="pair", index=0, value=5),
        "scaled_row": replace(scores, fault="row_scaled", index=1, value=2),
        "negated": replace(scores, fault="negate"),
        "constant_added": replace(scores, fault="every", value=1000),
        "zero": replace(scores, fault="zero"),
        "rolled": replace(scores, fault="roll"),
        "swapped_keys": replace(scores, fault="swap_elements", index=2),
        "minimum": replace(scores, fault="set", index=1, value=-(1 << 31)),
        "maximum": replace(scores, fault="set", index=1, value=(1 << 31) - 1),
        "prefill": replace(scores, step=0, fault="add", index=0, value=-1),
    }.items():
        yield _case(f"consistent_scores/{name}", fault, ATTENTION, TRANSFER)
    if config.num_heads > 1:
        yield _case(
            "consistent_scores/swapped_heads", replace(scores, fault="swap_heads", value=-1), ATTENTION, TRANSFER
        )
    yield _case("swapped_scores_of_sequences", Attack("swap", step=1, claim="layers.0.scores.0"), ATTENTION, TRANSFER)


_OPERANDS = {
    "sees_future": 0, "misses_key": 0, "wrong_group": 1, "stale_entry": 1, "corrupt_key": 1, "corrupt_value": 2,
    "wrong_position": 1, "other_sequence": 2,
}  # fmt: skip


def work_cases(config: ModelConfig, other_model: str | None = None) -> Iterator[Case]:
    """Valid work for something else: another token, model, weight, input, step, layer."""
    last = config.num_layers - 1
    for step in (0, 1):
        yield _case(f"other_token/step_{step}", Attack("other_token", step=step), FREIVALDS)
    if other_model is not None:
        yield _case("other_model", Attack("other_model", text=other_model), FREIVALDS)
    for kind in ("qkv", "o", "gate_up", "down", "lm_head"):
        name = claim_name(kind, last)
        weight = Attack("wrong_weight", step=0, claim=name, index=11, seed=3, value=1)
        # A weight whose input happens to be 0 shows later or never: which step it is depends on the model.
        yield Case(f"wrong_weight/{kind}", weight, frozenset({FREIVALDS}), steps=None)
        wrong_input = Attack("wrong_input", step=1, claim=name, fault="swap_elements", index=2)
        yield _case(f"wrong_input/{kind}", wrong_input, FREIVALDS)
    for kind in ("qkv", "attention", "o", "gate_up", "down", "lm_head"):
        replayed = Attack("replay", step=2, index=1, claim=claim_name(kind, 0))
        yield _case(f"replayed_step/{kind}", replayed, code_of(kind))
    if config.num_layers > 1:
        for kind in ("qkv", "attention", "o", "gate_up", "down"):
            spliced = Attack("splice", step=1, claim=claim_name(kind, last), text=claim_name(kind, 0))
            yield _case(f"spliced_layer/{kind}", spliced, code_of(kind))
    yield _case("spliced_operation", Attack("splice", step=0, claim="layers.0.down", text="layers.0.o"), FREIVALDS)


def message_cases() -> Iterator[Case]:
    """Messages that are missing, doubled, torn, mislabelled or late."""
    o = "layers.0.o"
    for step in (0, 1):
        for kind in ("skip", "duplicate", "hold", "short", "long", "huge"):
            yield _case(f"{kind}/step_{step}", Attack(kind, step=step, claim=o), TRANSCRIPT)
    headers: dict[str, tuple[tuple[str, int], str]] = {
        "magic": (("magic", 1), MALFORMED),
        "magic_high": (("magic", 1 << 24), MALFORMED),
        "flags": (("flags", 1), MALFORMED),
        "session": (("session", 1), MALFORMED),
        "session_high": (("session", 1 << 63), MALFORMED),
        "seq_ahead": (("seq", 1), TRANSCRIPT),
        "seq_behind": (("seq", -1), TRANSCRIPT),
        "seq_high": (("seq", 1 << 63), TRANSCRIPT),
        "kind_ready": (("kind", Kind.READY - Kind.CLAIM), TRANSCRIPT),
        "kind_logits": (("kind", Kind.LOGITS - Kind.CLAIM), TRANSCRIPT),
        "kind_error": (("kind", Kind.ERROR - Kind.CLAIM), TRANSCRIPT),
        "kind_unknown": (("kind", 1000), TRANSCRIPT),
        "size_more": (("payload_bytes", 1), TRANSCRIPT),
        "size_less": (("payload_bytes", -1), TRANSCRIPT),
        "size_huge": (("payload_bytes", 1 << 62), TRANSCRIPT),
        "untouched": (("seq", 0), OK),
    }
    for name, ((field, value), code) in headers.items():
        yield _case(f"header_{name}", Attack("header", step=1, claim=o, text=field, value=value), code)
    for claim in ("layers.0.qkv", "lm_head"):
        yield _case(f"half/{claim}", Attack("half", claim=claim), TIMEOUT)
        yield _case(f"half_die/{claim}", Attack("half_die", claim=claim), UNAVAILABLE)
        yield _case(f"silence/{claim}", Attack("silence", step=1, claim=claim), TIMEOUT)
        yield _case(f"die/{claim}", Attack("die", step=1, claim=claim), UNAVAILABLE)
        yield _case(f"hangup/{claim}", Attack("hangup", step=1, claim=claim), UNAVAILABLE)
        yield _case(f"error/{claim}", Attack("error", step=1, claim=claim, text=HOSTILE_TEXT), FAULT)
    last = Attack(step=1, claim="lm_head")
    yield _case("skip/lm_head", replace(last, kind="skip"), TIMEOUT)
    for kind in ("duplicate", "extra"):  # met where the next step's first claim belongs
        yield _case(f"{kind}/lm_head", replace(last, kind=kind), TRANSCRIPT, steps=2)
    yield _case("after_die/lm_head", replace(last, kind="after_die"), UNAVAILABLE, steps=2)
    yield _case("extra/last_step", Attack("extra", step=3, claim="lm_head"), OK)
    yield Case("slow", Attack("slow", value=2), frozenset({OK}), steps=SCRIPT_STEPS, applied=False)


def start_cases() -> Iterator[Case]:
    """Before the first step."""
    for phase in ("START", "HELLO", "READY"):
        yield _case(f"die/{phase}", Attack("die", claim=phase), UNAVAILABLE)
        yield _case(f"silence/{phase}", Attack("silence", claim=phase), TIMEOUT)
    for phase in ("HELLO", "READY"):
        yield _case(f"hangup/{phase}", Attack("hangup", claim=phase), UNAVAILABLE)
    yield _case("after_die/READY", Attack("after_die", claim="READY"), UNAVAILABLE)
    for kind, code in {
        "skip": TIMEOUT, "short": TRANSCRIPT, "long": TRANSCRIPT, "huge": TRANSCRIPT, "duplicate": TRANSCRIPT,
        "ready_garbage": MALFORMED, "ready_padding": MALFORMED, "ready_protocol": FAULT, "ready_spec": FAULT,
    }.items():  # fmt: skip
        yield _case(f"{kind}/READY", Attack(kind, claim="READY", seed=4), code)
    yield _case("error/READY", Attack("error", claim="READY", text=HOSTILE_TEXT), FAULT)
    yield _case("ready_name", Attack("ready_name", claim="READY", text=HOSTILE_TEXT), OK)


def boundary_cases() -> Iterator[Case]:
    """Shared memory, the socket beside it, the verifier's process."""
    here = Attack(step=1, claim="layers.0.gate_up")
    for name, value in {"far": 1 << 40, "past_the_ring": 100, "back": -1, "wrapped": 1 << 63, "max": -100}.items():
        yield _case(f"ring_head/{name}", replace(here, kind="ring_head", value=value), MALFORMED)
    for name, value in {"far": 1 << 40, "past_the_head": 100, "max": -100}.items():
        # Only a full ring makes the verifier look: with four slots, at the fifth message, after the third step.
        yield _case(f"ring_tail/{name}", Attack("ring_tail", claim="READY", value=value), MALFORMED, steps=3)
    yield _case("ring_premature", replace(here, kind="ring_premature"), MALFORMED)
    for kind in ("ring_scribble", "ring_words", "wakeups"):
        yield _case(kind, replace(here, kind=kind), OK)
    for seed in range(3):
        mutated = Attack("ring_mutate", step=0, claim="layers.0.qkv", seed=seed)
        allowed = frozenset({OK, FREIVALDS, ATTENTION, TRANSCRIPT, MALFORMED, FAULT})
        yield Case(f"ring_mutate/{seed}", mutated, allowed)
    yield Case("resize", Attack("resize"), frozenset({OK}), steps=SCRIPT_STEPS, applied=False)
    yield Case("read_parent", Attack("read_parent"), frozenset({OK}), steps=SCRIPT_STEPS, applied=False)


@dataclass(frozen=True)
class Setup:
    """A way in which claims reach the verifier. limit: see `Case`."""

    flow: Flow
    check: AttentionCheck
    limit: int | None = None

    def sends_step(self, step: int) -> int:
        """Number of the step on the wire that a step of the script ends with: a limit cuts the first one in two."""
        return step if self.limit is None else step + 1


SPLIT_LIMIT = 3
SETUPS: dict[str, Setup] = {
    "run-ahead-replay": Setup(Flow.RUN_AHEAD, REPLAY),
    "run-ahead-transfer": Setup(Flow.RUN_AHEAD, TRANSFER),
    "veriattn-replay": Setup(Flow.VERIATTN, REPLAY),
    "veriattn-transfer": Setup(Flow.VERIATTN, TRANSFER),
    "tsdp": Setup(Flow.TSDP, TRANSFER),
    "run-ahead-split": Setup(Flow.RUN_AHEAD, REPLAY, SPLIT_LIMIT),
    "veriattn-split": Setup(Flow.VERIATTN, REPLAY, SPLIT_LIMIT),
    "tsdp-split": Setup(Flow.TSDP, TRANSFER, SPLIT_LIMIT),
}


def mediated_cases(config: ModelConfig) -> Iterator[Case]:
    """Where the verifier asks for single operations, or shares attention: claims travel in blocks, tiles and shares."""
    last = config.num_layers - 1
    for setup, how in SETUPS.items():
        if how.flow is Flow.RUN_AHEAD and how.limit is None:
            continue

        def case(name: str, attack: Attack, code: str, setup: str = setup, how: Setup = how) -> Case:
            sent = replace(attack, step=how.sends_step(attack.step))
            known = _case(f"{setup}/{name}", sent, code, how.check, attack.step)
            return replace(known, flow=how.flow, limit=how.limit)

        for kind in claim_kinds(TRANSFER if how.limit is not None else how.check):
            here = Attack("fault", step=1, claim=claim_name(kind, last), index=1)
            for name, attack in {
                "bit": replace(here, fault="bit", value=3),
                "zero": replace(here, fault="zero"),
                "element": replace(here, fault="element", seed=5, step=2),
            }.items():
                yield case(f"{name}/{kind}", attack, code_of(kind))
        for kind, code in {
            "duplicate": TRANSCRIPT,
            "short": TRANSCRIPT,
            "die": UNAVAILABLE,
            "silence": TIMEOUT,
        }.items():
            attack = Attack(kind, step=1, claim="layers.0.o")
            yield case(f"{kind}/o", attack, code)


def catalogue(config: ModelConfig, other_model: str | None = None) -> list[Case]:
    """Every named attack. `other_model`: the directory of another model of the same shape."""
    cases = [
        *value_cases(config), *attention_cases(config), *work_cases(config, other_model), *message_cases(),
        *start_cases(), *boundary_cases(), *mediated_cases(config),
    ]  # fmt: skip
    return cases
