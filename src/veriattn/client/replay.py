"""Replay: recompute an answer on one's own CPU and compare token ids. No TEE needs to be trusted for it.

The canonical function gives the same bits everywhere, so the answer's tokens, fed in one prefill, give the logits that
the server had, and the canonical sampler must draw the same tokens from them. What the caller holds is the raw request
and response and the receipt. A response carries text, the receipt digests of token ids: the text is encoded to a draft
of the ids; where encoding does not give the ids back, the replay goes on from the first difference with what it drew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veriattn.attest import receipts
from veriattn.attest.canonical import Json
from veriattn.attest.verify import Step
from veriattn.client import asked
from veriattn.engine.strategies import TeeWeights
from veriattn.engine.text import IncrementalDecoder, StopMatcher, TextCodec
from veriattn.errors import AttestationError, ModelError, UsageError
from veriattn.native import kernels
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.forward import Batch, BatchEntry, forward
from veriattn.spec.local import LocalOperations
from veriattn.spec.sampler import SamplingParams, sample

_CHUNK = 256
_DRAFTS = 4


@dataclass
class Replay:
    """The outcome. `forward_passes` counts chunks of at most 256 tokens; `drafts` how often a text was encoded."""

    steps: list[Step] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    tokens_computed: int = 0
    drafts: int = 0
    compute_s: float = 0.0
    load_s: float = 0.0

    @property
    def matches(self) -> bool:
        """True only if there are steps and every one passed."""
        return bool(self.steps) and all(s.status == "PASS" for s in self.steps)

    def require(self) -> None:
        """Raises: AttestationError naming the first step that did not pass."""
        if not self.matches:
            step = next((s for s in self.steps if s.status != "PASS"), Step("none", "SKIP", "nothing was replayed"))
            raise AttestationError(f"the replay does not match: {step.name}: {step.reason}")

    def to_json(self) -> Json:
        return {
            "verdict": "MATCH" if self.matches else "MISMATCH",
            "matches": self.matches,
            "steps": [s.to_json() for s in self.steps],
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens_computed": self.tokens_computed,
            "drafts": self.drafts,
            "timing": {
                "load_s": self.load_s,
                "compute_s": self.compute_s,
                "ms_per_token": 1000 * self.compute_s / max(1, self.tokens_computed),
                "ms_per_output_token": 1000 * self.compute_s / max(1, self.output_tokens),
            },
        }


class ReplayModel:
    """A model directory, hashed and packed for this machine's kernels. Raises: ModelError."""

    def __init__(self, path: Path, expected_digest: str | None = None) -> None:
        self._weights = TeeWeights(path, expected_digest=expected_digest)
        self.manifest = self._weights.manifest
        m = self.manifest
        self.codec = TextCodec(
            self._weights.tokenizer_json,
            self._weights.chat_template,
            m.bos_id,
            m.eos_ids,
            m.add_bos,
            m.config.vocab_size,
        )

    def sequence(self) -> _Sequence:
        """A fresh sequence."""
        return _Sequence(self._weights)


class _Sequence:
    """One sequence on this machine, fed in chunks."""

    def __init__(self, weights: TeeWeights) -> None:
        self._weights = weights
        self._ops = LocalOperations(weights.manifest.config, weights.packed.__getitem__, kernels)
        self.length = 0

    def feed(self, ids: Sequence[int], *, logits: bool) -> Any:
        """Run ids after those before them; the logits of each, or of none. At most 256 at a time."""
        entry = BatchEntry(0, self.length, tuple(ids), "all" if logits else "none")
        self.length += len(ids)
        return forward(self._weights.tensors, Batch((entry,)), self._ops, kernels)


@dataclass(frozen=True)
class ClaimedChoice:
    """What a response says of one of its choices. `token_ids` is None where it gives text alone."""

    text: str
    finish_reason: str | None
    token_ids: tuple[int, ...] | None = None


def claimed_choices(response: bytes, chat: bool) -> dict[int, ClaimedChoice]:
    """The choices of a raw response, whole or streamed, by index; chat: whether messages were asked for, or plain text.

    Trust: the response is adversarial, and must not read otherwise to whoever shows it. So its layout is that of
    `veriattn serve`, to the byte where streams are concerned: nothing twice, nothing in between. Raises: AttestationError.
    """
    try:
        text = response.decode("utf-8")
        if text.startswith("{"):
            return _whole(_json(text), chat)
        return _streamed(text, chat)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise AttestationError(f"the response is not one of this API: {type(e).__name__}") from None


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_name_twice)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> Json:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a member name occurs twice")
    return out


def _whole(body: Any, chat: bool) -> dict[int, ClaimedChoice]:
    out: dict[int, ClaimedChoice] = {}
    for place, c in enumerate(body["choices"]):
        text = c["message"]["content"] if chat else c["text"]
        ids = c.get("token_ids")
        if type(c["index"]) is not int or c["index"] != place or type(text) is not str:
            raise AttestationError("the response's choices are not in their order, or have no text")
        out[place] = ClaimedChoice(text, c["finish_reason"], None if ids is None else tuple(map(int, ids)))
    return out


def _streamed(text: str, chat: bool) -> dict[int, ClaimedChoice]:
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    # Not splitlines: text may hold U+2028 and others of its kind, which end no line of a stream.
    *events, rest = text.split("\n\n")
    if rest or not events or events.pop() != "data: [DONE]":
        raise AttestationError("the stream did not end as a finished one does")
    for event in events:
        if not event.startswith("data: ") or not set(event).isdisjoint("\r\n"):
            raise AttestationError("the stream holds something other than events of one line")
        for c in _json(event.removeprefix("data: "))["choices"]:
            index = c["index"]
            delta = c["delta"].get("content") if chat else c["text"]
            if type(index) is not int or type(delta or "") is not str:
                raise AttestationError("the stream has a choice without a number, or whose text is none")
            texts[index] = texts.get(index, "") + (delta or "")
            reasons[index] = c["finish_reason"] or reasons.get(index)
    return {i: ClaimedChoice(t, reasons[i]) for i, t in texts.items()}


def prompt_ids(body: Json, codec: TextCodec) -> list[tuple[int, ...]]:
    """The token ids of each prompt of a request's body, as the server encodes them. Raises: UsageError, ModelError."""
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list):
            raise UsageError("the request's messages are not a list")
        return [tuple(codec.encode_chat([_message(m) for m in messages]))]
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    out = []
    for p in prompts:
        if isinstance(p, str):
            out.append(tuple(codec.encode(p)))
        elif isinstance(p, list) and all(type(i) is int for i in p):
            out.append(tuple(p))
        else:
            raise UsageError("the request has neither messages nor a prompt")
    return out


def _message(message: object) -> Json:
    """What the chat template sees of a message. Raises: UsageError."""
    if not isinstance(message, dict):
        raise UsageError("a message of the request is not an object")
    # The newer role is what templates call system.
    role = "system" if message.get("role") == "developer" else message.get("role")
    name = {"name": message["name"]} if message.get("name") else {}
    return {"role": role, "content": message.get("content"), **name}


def sampling_params(sampling: Json) -> tuple[SamplingParams, bool]:
    """The receipt's parameters and whether end-of-text tokens are ignored. Raises: AttestationError."""
    try:
        params = SamplingParams(
            temperature=float(sampling["temperature"]),
            top_k=sampling["top_k"],
            top_p=float(sampling["top_p"]),
            min_p=float(sampling["min_p"]),
            repetition_penalty=float(sampling["repetition_penalty"]),
            presence_penalty=float(sampling["presence_penalty"]),
            frequency_penalty=float(sampling["frequency_penalty"]),
            logit_bias=tuple((int(i), float(b)) for i, b in sampling["logit_bias"]),
            seed=int(sampling["seed"]),
        )
        return params, bool(sampling["ignore_eos"])
    except (KeyError, TypeError, ValueError) as e:
        raise AttestationError(f"the receipt's sampling parameters are not complete: {e}") from None
    except UsageError as e:
        raise AttestationError(f"the receipt's sampling parameters are out of range: {e.message}") from None


class Replayer:
    """Recomputes the answer of one receipt.

     1. receipt            it is well formed (its signature is `receipt verify`'s matter)
     2. request, response  the raw bytes are those of the receipt
     3. model              the local model's digest and the spec version are the receipt's
     4. prompt.N           the request, encoded here, gives the receipt's prompt ids
     5. choices            receipt and response have the choices that were asked for
     6. sampling           the receipt's parameters are those that were asked for
     7. choice.N.tokens    the canonical function draws the receipt's output ids, token for token
     8. choice.N.text      they are the text and the end of the response

    Trust: everything but the local model is adversarial.
    """

    def __init__(self, model: ReplayModel) -> None:
        self._model = model

    def replay(self, receipt: Json, request: bytes, response: bytes) -> Replay:
        """Never raises for what the server sent; `Replay.require` does. Raises: NumericsError."""
        out = Replay()
        try:
            parsed = receipts.parse(receipt)
            out.steps.append(Step("receipt", "PASS", f"schema {receipts.SCHEMA_VERSION}"))
            bodies = (("request", request, parsed.request_sha256), ("response", response, parsed.response_sha256))
            for what, raw, recorded in bodies:
                same = "sha256:" + hashlib.sha256(raw).hexdigest() == recorded
                out.steps.append(_step(what, same, f"{len(raw)} bytes", f"the receipt is of another {what}"))
            self._check_model(parsed.event, out)
            if not out.matches:
                return out
            body = _body(request)
            prompts = self._prompts(parsed.event, body, out)
            claimed = claimed_choices(response, chat="messages" in body)
            self._check_choices(parsed.event, body, set(claimed), out)
            if not out.matches:
                return out
            params, ignore_eos = sampling_params(parsed.event["sampling"])
            self._check_sampling(params, ignore_eos, body, out)
            if not out.matches:
                return out
            ending = _Ending.of(body, parsed.event, ignore_eos)
            for c in parsed.event["choices"]:
                _Choice(self._model, out, c, claimed[c["index"]], params, ending).run(prompts[c["prompt"]])
        except (AttestationError, UsageError) as e:
            out.steps.append(Step("replay", "FAIL", e.message))
        return out

    def _check_model(self, event: Json, out: Replay) -> None:
        mine = self._model.manifest.digest
        same = event["model_digest"] == mine and event["spec_version"] == SPEC_VERSION
        wrong = f"the receipt is of model {event['model_digest']}, spec version {event['spec_version']}"
        out.steps.append(_step("model", same, mine, wrong))

    def _check_choices(self, event: Json, body: Json, claimed: set[int], out: Replay) -> None:
        wanted = asked.choices(body, len(event["prompts"]))
        recorded = [(c["index"], c["prompt"], c["choice"]) for c in event["choices"]]
        same = claimed == {c["index"] for c in event["choices"]}
        wrong = "response and receipt have different choices" if not same else "these choices were not asked for"
        out.steps.append(_step("choices", same and recorded == wanted, f"{len(wanted)}", wrong))

    def _check_sampling(self, recorded: SamplingParams, ignore_eos: bool, body: Json, out: Replay) -> None:
        recorded = replace(recorded, logit_bias=tuple(sorted(recorded.logit_bias)), seed=recorded.seed % 2**64)
        wanted, wanted_ignore_eos = asked.sampling(body, recorded.seed)
        odd = [name for name, value in vars(wanted).items() if value != getattr(recorded, name)]
        odd += [] if ignore_eos == wanted_ignore_eos else ["ignore_eos"]
        left = not recorded.greedy and body.get("seed") is None
        good = f"as asked for; the server chose the seed {recorded.seed}" if left else "as asked for"
        out.steps.append(_step("sampling", not odd, good, f"the request asks for other parameters: {', '.join(odd)}"))

    def _prompts(self, event: Json, body: Json, out: Replay) -> list[tuple[int, ...]]:
        try:
            prompts = prompt_ids(body, self._model.codec)
        except ModelError as e:
            raise AttestationError(e.message) from None
        same = len(prompts) == len(event["prompts"])
        out.steps.append(_step("prompts", same, f"{len(prompts)}", "request and receipt have different prompts"))
        for i, (ids, recorded) in enumerate(zip(prompts, event["prompts"], strict=False)):
            same = receipts.ids_digest(ids) == recorded["prompt_ids_sha256"] and len(ids) == recorded["prompt_tokens"]
            bounded = 0 < len(ids) <= self._model.manifest.config.max_positions
            known = bounded and min(ids) >= 0 and max(ids) < self._model.manifest.config.vocab_size
            out.steps.append(
                _step(f"prompt.{i}", same and known, f"{len(ids)} tokens", "the request encodes to other token ids")
            )
        return prompts


def _body(request: bytes) -> Json:
    try:
        body = json.loads(request)
    except (ValueError, RecursionError):
        raise AttestationError("the request is not JSON") from None
    if not isinstance(body, dict):
        raise AttestationError("the request is not a JSON object")
    return body


def _step(name: str, ok: bool, good: str, bad: str) -> Step:
    return Step(name, "PASS" if ok else "FAIL", good if ok else bad)


@dataclass(frozen=True)
class _Ending:
    """What may end an answer: stop strings, end-of-text tokens, and how many tokens were asked for (None: not known)."""

    stops: tuple[str, ...]
    ignore_eos: bool
    max_tokens: int | None

    @classmethod
    def of(cls, body: Json, event: Json, ignore_eos: bool) -> _Ending:
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
            raise UsageError("the request's stop strings are not text")
        most = asked.max_tokens(body, event["sampling"].get("max_tokens"))
        return cls(tuple(s for s in stops if s), ignore_eos, most)


class _Choice:
    """The replay of one answer."""

    def __init__(
        self,
        model: ReplayModel,
        out: Replay,
        recorded: Json,
        claimed: ClaimedChoice,
        params: SamplingParams,
        ending: _Ending,
    ) -> None:
        self._model, self._out, self._recorded, self._claimed = model, out, recorded, claimed
        self._params, self._ending = params, ending
        self._count: int = recorded["output_tokens"]
        self._digest: str = recorded["output_ids_sha256"]
        self._name = f"choice.{recorded['index']}"

    def run(self, prompt: tuple[int, ...]) -> None:
        out, config = self._out, self._model.manifest.config
        if self._count < 1 or len(prompt) + self._count > config.max_positions:
            out.steps.append(Step(f"{self._name}.tokens", "FAIL", f"{self._count} output tokens do not fit the model"))
            return
        out.prompt_tokens += len(prompt)
        out.output_tokens += self._count
        began = time.monotonic()
        ids, difference = self._draw(prompt)
        out.compute_s += time.monotonic() - began
        same = difference is None and receipts.ids_digest(ids) == self._digest
        bad = difference or "the model draws other token ids than the receipt records"
        out.steps.append(_step(f"{self._name}.tokens", same, f"{len(ids)} token ids are the model's own", bad))
        if same:
            self._compare_text(ids, len(prompt))

    def _draw(self, prompt: tuple[int, ...]) -> tuple[list[int], str | None]:
        """The ids that the model draws, and where they differ from the recorded ones if those are known exactly."""
        confirmed: list[int] = []
        for _ in range(_DRAFTS):
            draft = self._draft(confirmed)
            if len(draft) <= len(confirmed):
                break
            self._out.drafts += 1
            exact = receipts.ids_digest(draft) == self._digest
            confirmed, wrong = self._follow(prompt, draft, len(confirmed))
            if wrong and exact:
                at = len(confirmed) - 1
                return confirmed, f"token {at}: the model draws {confirmed[at]}, the answer has {draft[at]}"
            if len(confirmed) == self._count:
                return confirmed, None
            if not wrong:
                break
        return self._continue(prompt, confirmed), None

    def _draft(self, confirmed: list[int]) -> list[int]:
        """A guess of all output ids that begins with `confirmed`."""
        codec, claimed = self._model.codec, self._claimed
        if claimed.token_ids is not None:
            draft = list(claimed.token_ids)
            fits = draft[: len(confirmed)] == confirmed
            return draft[: self._count] if fits and all(0 <= t < codec.vocab_size for t in draft) else []
        text = codec.decode(confirmed)
        if not claimed.text.startswith(text):
            return []
        draft = confirmed + codec.encode(claimed.text[len(text) :], add_bos=False)
        if len(draft) < self._count and claimed.finish_reason == "stop" and codec.eos_ids:
            draft.append(codec.eos_ids[0])
        return draft[: self._count]

    def _follow(self, prompt: tuple[int, ...], draft: list[int], trusted: int) -> tuple[list[int], bool]:
        """Feed prompt and draft in one prefill; stop at the first token that the sampler does not draw.

        `trusted` tokens were drawn before. Returns the drawn ids (the last one in place of a wrong one), and whether
        there was a wrong one. An end of text ends them.
        """
        sequence = self._model.sequence()
        drawn = draft[:trusted]
        ids = [*prompt, *draft]
        first = len(prompt) - 1 + trusted
        for start in range(0, first, _CHUNK):
            part = ids[start : min(first, start + _CHUNK)]
            self._out.tokens_computed += len(part)
            sequence.feed(part, logits=False)
        for start in range(first, len(ids) - 1, _CHUNK):
            part = ids[start : min(len(ids) - 1, start + _CHUNK)]
            self._out.tokens_computed += len(part)
            for row in sequence.feed(part, logits=True):
                drawn.append(self._sample(row, prompt, drawn))
                if drawn[-1] != draft[len(drawn) - 1]:
                    return drawn, True
        return drawn, False

    def _continue(self, prompt: tuple[int, ...], drawn: list[int]) -> list[int]:
        """Draw the rest one by one, as the server did."""
        drawn = list(drawn)
        sequence = self._model.sequence()
        rest = [*prompt, *drawn]
        while len(drawn) < self._count:
            last = rest[-1:]
            for start in range(0, len(rest) - 1, _CHUNK):
                sequence.feed(rest[start : min(len(rest) - 1, start + _CHUNK)], logits=False)
            self._out.tokens_computed += len(rest)
            row = sequence.feed(last, logits=True)[0]
            drawn.append(self._sample(row, prompt, drawn))
            rest = drawn[-1:]
        return drawn

    def _sample(self, row: Any, prompt: Sequence[int], drawn: Sequence[int]) -> int:
        return sample(row, self._params, prompt, drawn, len(prompt) + len(drawn), self._recorded["choice"])

    def _compare_text(self, ids: list[int], prompt_tokens: int) -> None:
        """What the engine makes of the ids must be what the response says, and its end must be a right one."""
        decoder, matcher = IncrementalDecoder(self._model.codec), StopMatcher(self._ending.stops)
        text, reason = "", "length"
        for at, token in enumerate(ids):
            if token in self._model.codec.eos_ids and not self._ending.ignore_eos:
                reason, piece = "stop", decoder.finish()
            else:
                piece = decoder.push(token)
            text += matcher.push(piece)
            if matcher.matched:
                reason = "stop"
            if reason == "stop" and at != len(ids) - 1:
                wrong = f"the answer should have ended at token {at}"
                self._out.steps.append(Step(f"{self._name}.text", "FAIL", wrong))
                return
        wanted, full = self._ending.max_tokens, prompt_tokens + len(ids) >= self._model.manifest.config.max_positions
        if reason == "length" and wanted is not None and len(ids) != wanted and not full:
            wrong = f"the answer was cut after {len(ids)} of {wanted} tokens"
            self._out.steps.append(Step(f"{self._name}.text", "FAIL", wrong))
            return
        if reason == "length":
            text += matcher.push(decoder.finish())
        text += matcher.finish()
        ended = reason == self._claimed.finish_reason == self._recorded["finish_reason"]
        good = f"{len(text)} characters, finish_reason {reason}"
        bad = "the token ids are another text" if text != self._claimed.text else "the answer ended for another reason"
        self._out.steps.append(_step(f"{self._name}.text", text == self._claimed.text and ended, good, bad))
