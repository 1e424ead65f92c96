"""Replay: honest answers match, greedy and sampled; every lie about them is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.client.conftest import Answer, sampling_fields

from veriattn.attest import receipts
from veriattn.attest.providers import TestProvider
from veriattn.attest.service import ReceiptService
from veriattn.client.replay import ClaimedChoice, Replayer, ReplayModel, claimed_choices
from veriattn.errors import AttestationError, ModelError
from veriattn.spec.sampler import SamplingParams

Make = Callable[..., Answer]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=2**63 + 5)


def replay(model: ReplayModel, a: Answer) -> Any:
    return Replayer(model).replay(a.receipt, a.request, a.response)


def failed(found: Any) -> list[str]:
    return [s.name for s in found.steps if s.status == "FAIL"]


def why(found: Any) -> str:
    return next(s.reason for s in found.steps if s.status == "FAIL")


@pytest.mark.parametrize(
    ("params", "options"),
    [
        (SamplingParams(), {}),
        (SAMPLED, {}),
        (SAMPLED, {"stream": True}),
        (SAMPLED, {"n": 3}),
        (SAMPLED, {"n": 2, "stream": True, "token_ids": True}),
        (SAMPLED, {"token_ids": True}),
        (SAMPLED, {"body": {"prompt": "abc"}}),
        (SAMPLED, {"body": {"prompt": ["abc", "de"]}, "n": 2}),
        (SAMPLED, {"body": {"prompt": [4, 5, 6, 7]}}),
        (SAMPLED, {"body": {"prompt": "abc"}, "ignore_eos": True, "max_tokens": 200}),
        (SAMPLED, {"body": {"prompt": "a" * 700}}),
        (
            SamplingParams(
                temperature=1.3, top_k=40, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
                frequency_penalty=0.1, logit_bias=((9, 2.5), (5, -1.0)), seed=7,
            ),
            {"max_tokens": 60},
        ),
    ],
)  # fmt: skip
def test_honest_answers_match(
    answer: Make, replay_model: ReplayModel, params: SamplingParams, options: dict[str, Any]
) -> None:
    a = answer(params, **options)
    found = replay(replay_model, a)
    assert [s for s in found.steps if s.status != "PASS"] == []
    assert found.matches
    found.require()
    assert found.output_tokens == sum(map(len, a.outputs))


def test_the_tokens_of_an_answer_are_fed_in_one_prefill(answer: Make, replay_model: ReplayModel) -> None:
    a = answer(SAMPLED, token_ids=True, ignore_eos=True, max_tokens=100)
    found = replay(replay_model, a)
    assert found.matches
    assert found.drafts == 1
    assert found.tokens_computed == len(a.prompts[0]) + 100 - 1


def test_a_stop_string_and_an_end_of_text(answer: Make, replay_model: ReplayModel) -> None:
    long = answer(SAMPLED, ignore_eos=True, max_tokens=64)
    text = json.loads(long.response)["choices"][0]["message"]["content"]
    stop = text[10:12]
    a = answer(SAMPLED, ignore_eos=True, max_tokens=64, stop=(stop,))
    assert json.loads(a.response)["choices"][0]["finish_reason"] == "stop"
    assert replay(replay_model, a).matches
    ends = SamplingParams(logit_bias=((1, 1000.0),))
    b = answer(ends)
    assert b.outputs == [[1]]
    assert json.loads(b.response)["choices"][0]["finish_reason"] == "stop"
    assert replay(replay_model, b).matches


def test_messages_as_the_server_reads_them(answer: Make, replay_model: ReplayModel) -> None:
    """Content in parts, the role `developer`, fields that templates do not see, empty stop strings."""
    sent = [
        {"role": "developer", "content": "be brief", "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "extra": "x"},
    ]
    rendered = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
    a = answer(SAMPLED, body={"messages": rendered})
    fields = sampling_fields(SAMPLED)
    request = json.dumps({"messages": sent, "max_tokens": 24, "stop": ["", "\x00never"], **fields}).encode()
    issued = ReceiptService(TestProvider()).issue(request, a.response, a.receipt["event_log"][1], "k", "c")
    assert Replayer(replay_model).replay(issued, request, a.response).matches
    for bad in ([5], "x", [{"content": "a"}], [{"role": "user"}], []):
        request = json.dumps({"messages": bad}).encode()
        issued = ReceiptService(TestProvider()).issue(request, a.response, a.receipt["event_log"][1], "k", "c")
        assert failed(Replayer(replay_model).replay(issued, request, a.response)) == ["replay"]


def test_without_the_text_of_bytes_the_replay_draws_on(
    answer: Make, replay_model: ReplayModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that never gives the ids back costs more, and matches all the same."""
    a = answer(SAMPLED)
    monkeypatch.setattr(type(replay_model.codec), "decode", lambda *_: "nothing like it")
    found = replay(replay_model, a)
    assert found.matches
    assert found.drafts == 0
    assert found.tokens_computed == len(a.prompts[0]) + len(a.outputs[0]) - 1


# --- lies -----------------------------------------------------------------------------------------------------------


def test_another_model(answer: Make, other_model_path: Any, model_path: Any) -> None:
    other = ReplayModel(other_model_path)
    found = replay(other, answer(SAMPLED))
    assert failed(found) == ["model"]
    with pytest.raises(AttestationError, match="model"):
        found.require()
    with pytest.raises(ModelError):
        ReplayModel(model_path, expected_digest="0" * 64)


def test_the_answer_of_another_model_under_this_ones_digest(
    answer: Make, replay_model: ReplayModel, other_model_path: Any
) -> None:
    """A hollow server: it names the right model and serves another."""
    digest = replay_model.manifest.digest
    a = answer(SAMPLED, token_ids=True)
    wrong = [t ^ 1 for t in a.outputs[0]]
    changes = {"model_digest": digest, "choices": [receipts.choice_json(0, wrong, "length")]}

    def respond(r: dict[str, Any]) -> dict[str, Any]:
        r["choices"][0]["token_ids"] = wrong
        return r

    found = replay(replay_model, answer(SAMPLED, token_ids=True, event_changes=changes, respond=respond))
    assert failed(found) == ["choice.0.tokens"]
    assert why(found) == f"token 0: the model draws {a.outputs[0][0]}, the answer has {wrong[0]}"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_wrong_token_anywhere_is_found_at_its_place(
    data: st.DataObject, answer: Make, replay_model: ReplayModel
) -> None:
    honest = answer(SAMPLED, ignore_eos=True, max_tokens=12).outputs[0]
    at = data.draw(st.integers(0, len(honest) - 1))
    wrong = list(honest)
    wrong[at] = data.draw(st.integers(0, 259).filter(lambda t: t != honest[at]))
    changes = {"choices": [receipts.choice_json(0, wrong, "length")]}

    def respond(r: dict[str, Any]) -> dict[str, Any]:
        r["choices"][0]["token_ids"] = wrong
        return r

    a = answer(SAMPLED, ignore_eos=True, max_tokens=12, token_ids=True, event_changes=changes, respond=respond)
    found = replay(replay_model, a)
    assert failed(found) == ["choice.0.tokens"]
    assert why(found).startswith(f"token {at}: the model draws {honest[at]}")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6}, {"temperature": 0.8}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.5}, {"repetition_penalty": 2.0},
        {"presence_penalty": 5.0}, {"logit_bias": ((7, 50.0),)}, {"temperature": 0.0},
    ],
)  # fmt: skip
def test_other_parameters_than_those_recorded(answer: Make, replay_model: ReplayModel, change: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 0.9, "top_p": 0.95, "seed": 5, **change})
    changes = {"sampling": receipts.sampling_json(params, 24)}
    drawn = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
    a = answer(drawn, event_changes=changes, ask=sampling_fields(params))
    assert failed(replay(replay_model, a)) == ["choice.0.tokens"]


def test_another_prompt_than_the_requests(answer: Make, replay_model: ReplayModel) -> None:
    hidden = replay_model.codec.encode_chat([{"role": "system", "content": "x"}, {"role": "user", "content": "abc"}])
    found = replay(replay_model, answer(SAMPLED, event_changes={"prompts": [hidden]}))
    assert failed(found) == ["prompt.0"]


def test_raw_bytes_of_another_request_or_response(answer: Make, replay_model: ReplayModel) -> None:
    a = answer(SAMPLED)
    for what in ("request", "response"):
        changed = {"request": a.request, "response": a.response, what: getattr(a, what) + b" "}
        found = Replayer(replay_model).replay(a.receipt, changed["request"], changed["response"])
        assert failed(found) == [what]
        assert found.tokens_computed == 0


def edited(key: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def respond(r: dict[str, Any]) -> dict[str, Any]:
        c = r["choices"][0]
        if key == "content":
            c["message"]["content"] = value(c["message"]["content"])
        else:
            c[key] = value(c[key])
        return r

    return respond


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_is_not_the_tokens(answer: Make, replay_model: ReplayModel, stream: bool) -> None:
    for change in (lambda t: t + "x", lambda t: t[:-1], lambda t: "y" + t[1:], lambda t: ""):
        found = replay(replay_model, answer(SAMPLED, stream=stream, respond=edited("content", change)))
        assert failed(found) == ["choice.0.text"]
        assert why(found) == "the token ids are another text"


def test_another_end_than_the_answers(answer: Make, replay_model: ReplayModel) -> None:
    a = answer(SAMPLED, ignore_eos=True, respond=edited("finish_reason", lambda _: "stop"))
    assert why(replay(replay_model, a)) == "the answer ended for another reason"
    ids = answer(SAMPLED, ignore_eos=True).outputs[0]
    changes = {"choices": [receipts.choice_json(0, ids, "stop")]}
    a = answer(SAMPLED, ignore_eos=True, event_changes=changes)
    assert why(replay(replay_model, a)) == "the answer ended for another reason"


def test_an_answer_that_was_cut_short(answer: Make, replay_model: ReplayModel) -> None:
    """The server says `length` after fewer tokens than were asked for."""
    full = answer(SAMPLED, ignore_eos=True, max_tokens=20, body={"prompt": "abc"})
    short = full.outputs[0][:9]
    text = replay_model.codec.decode(short)

    def respond(r: dict[str, Any]) -> dict[str, Any]:
        r["choices"][0]["text"] = text
        return r

    changes = {"choices": [receipts.choice_json(0, short, "length")]}
    a = answer(SAMPLED, ignore_eos=True, max_tokens=20, body={"prompt": "abc"}, event_changes=changes, respond=respond)
    found = replay(replay_model, a)
    assert failed(found) == ["choice.0.text"]
    assert why(found) == "the answer was cut after 9 of 20 tokens"


def test_an_answer_that_goes_on_after_its_end(answer: Make, replay_model: ReplayModel) -> None:
    ends = SamplingParams(logit_bias=((1, 1000.0),))
    a = answer(
        ends,
        ignore_eos=True,
        max_tokens=3,
        event_changes={"sampling": receipts.sampling_json(ends, 3, ignore_eos=False)},
        ask={"ignore_eos": False},
    )
    found = replay(replay_model, a)
    assert failed(found) == ["choice.0.text"]
    assert why(found) == "the answer should have ended at token 0"


def test_missing_and_doubled_choices(answer: Make, replay_model: ReplayModel) -> None:
    def drop(r: dict[str, Any]) -> dict[str, Any]:
        r["choices"].pop()
        return r

    assert failed(replay(replay_model, answer(SAMPLED, n=2, respond=drop))) == ["choices"]
    one = receipts.choice_json(0, [1], "stop")
    assert failed(replay(replay_model, answer(SAMPLED, event_changes={"choices": [one, one]}))) == ["choices"]


STEERED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.0},
    "seed": {"seed": 6},
    "logit_bias": {"logit_bias": ((7, 1000.0),)},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "presence_penalty": {"presence_penalty": 5.0},
    "frequency_penalty": {"frequency_penalty": 5.0},
    "ignore_eos": {},
}


@pytest.mark.parametrize("name", STEERED)
def test_an_answer_under_other_parameters_than_asked_for(answer: Make, replay_model: ReplayModel, name: str) -> None:
    """The server draws honestly, and records honestly, under parameters of its own: with biases it can say what it likes."""
    asked = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
    done = replace(asked, **STEERED[name])
    a = answer(done, ignore_eos=name == "ignore_eos", ask=sampling_fields(asked))
    found = replay(replay_model, a)
    assert failed(found) == ["sampling"]
    assert why(found) == f"the request asks for other parameters: {name}"
    assert found.tokens_computed == 0
    assert replay(replay_model, answer(done, ignore_eos=name == "ignore_eos")).matches


def test_parameters_that_were_left_out_are_the_documented_ones(answer: Make, replay_model: ReplayModel) -> None:
    default = SamplingParams(temperature=1.0, seed=77)
    left_out = dict.fromkeys(sampling_fields(default))
    a = answer(default, ask=left_out)
    found = replay(replay_model, a)
    assert found.matches
    assert "the server chose the seed 77" in next(s.reason for s in found.steps if s.name == "sampling")
    found = replay(replay_model, answer(SamplingParams(temperature=0.5, seed=77), ask=left_out))
    assert why(found) == "the request asks for other parameters: temperature"
    # Clients write 1e-9 where they mean greedy; the server reads so.
    assert replay(replay_model, answer(SamplingParams(), ask={"temperature": 1e-9, "top_k": -1})).matches
    for odd in (
        {"temperature": True},
        {"seed": "5"},
        {"top_k": 1.5},
        {"ignore_eos": 1},
        {"logit_bias": {"x": 1}},
        {"n": 0},
    ):
        assert failed(replay(replay_model, answer(SAMPLED, ask=odd))) == ["replay"]


def test_choices_that_were_not_asked_for(answer: Make, replay_model: ReplayModel) -> None:
    """One draw sold twice, one prompt answered in the place of another, fewer choices than were asked for."""
    one = answer(SAMPLED, ignore_eos=True).outputs[0]
    text = replay_model.codec.decode(one)

    def twice(r: dict[str, Any]) -> dict[str, Any]:
        for c in r["choices"]:
            c["message"]["content"] = text
        return r

    sold = {"choices": [receipts.choice_json(i, one, "length", prompt=0, choice=0) for i in range(2)]}
    a = answer(SAMPLED, n=2, ignore_eos=True, event_changes=sold, respond=twice)
    assert why(replay(replay_model, a)) == "these choices were not asked for"
    a = answer(SAMPLED, n=1, ignore_eos=True, ask={"n": 2})
    assert failed(replay(replay_model, a)) == ["choices"]
    prompts = {"body": {"prompt": ["abc", "de"]}, "ignore_eos": True}
    honest = answer(SAMPLED, **prompts)
    assert replay(replay_model, honest).matches
    first = replay_model.codec.decode(honest.outputs[0])

    def same(r: dict[str, Any]) -> dict[str, Any]:
        r["choices"][1]["text"] = first
        return r

    sold = {"choices": [receipts.choice_json(i, honest.outputs[0], "length", prompt=0, choice=0) for i in range(2)]}
    a = answer(SAMPLED, **prompts, event_changes=sold, respond=same)
    assert why(replay(replay_model, a)) == "these choices were not asked for"


def test_a_completion_without_a_bound_has_the_documented_one(answer: Make, replay_model: ReplayModel) -> None:
    for prompt in ("abc", ["abc", "de"]):
        fields = {"body": {"prompt": prompt}, "ignore_eos": True, "ask": {"max_tokens": None}}
        assert replay(replay_model, answer(SAMPLED, max_tokens=16, **fields)).matches
        found = replay(replay_model, answer(SAMPLED, max_tokens=9, **fields))
        assert why(found) == "the answer was cut after 9 of 16 tokens"


@pytest.mark.parametrize(
    "change", [{}, {"temperature": "x"}, {"temperature": "-1"}, {"seed": None}, {"logit_bias": 5}, {"top_p": "2"}]
)
def test_damaged_sampling_parameters(answer: Make, replay_model: ReplayModel, change: dict[str, Any]) -> None:
    sampling = {**receipts.sampling_json(SAMPLED, 24), **change} if change else {}
    found = replay(replay_model, answer(SAMPLED, event_changes={"sampling": sampling}))
    assert failed(found) == ["replay"]


def test_absurd_counts_cost_nothing(answer: Make, replay_model: ReplayModel) -> None:
    for tokens in (0, 2**40):
        choice = {**receipts.choice_json(0, [1], "length"), "output_tokens": tokens}
        found = replay(replay_model, answer(SAMPLED, event_changes={"choices": [choice]}))
        assert failed(found) == ["choice.0.tokens"]
        assert found.tokens_computed == 0


def reworded(whole: str, honest: str, shown: str) -> dict[str, str]:
    """Responses that hold the honest text where a careless reader looks, and another where the SDK does."""
    choice = json.loads(whole)["choices"][0]
    other = {**choice, "message": {"content": shown}}
    return {
        "two choices of one number": json.dumps({"choices": [other, choice]}),
        "the honest one first": json.dumps({"choices": [choice, other]}),
        "a number that is none": json.dumps({"choices": [{**other, "index": True}, choice]}),
        "a name twice": whole.replace('"content"', f'"content": {json.dumps(shown)}, "content"'),
        "text beside a message": json.dumps({"choices": [{**choice, "text": shown, "index": "0"}]}),
    }


@pytest.mark.parametrize("how", reworded('{"choices": [{"message": {"content": ""}}]}', "", ""))
def test_a_response_that_can_be_read_in_two_ways(answer: Make, replay_model: ReplayModel, how: str) -> None:
    honest = answer(SAMPLED)
    text = json.loads(honest.response)["choices"][0]["message"]["content"]
    response = reworded(honest.response.decode(), text, "yes, wire the money")[how].encode()
    event = honest.receipt["event_log"][1]
    issued = ReceiptService(TestProvider()).issue(honest.request, response, event, "k", "c")
    assert failed(Replayer(replay_model).replay(issued, honest.request, response)) == ["replay"]
    assert replay(replay_model, honest).matches


def evil(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


@pytest.mark.parametrize(
    "slipped_in",
    [
        ":\rdata: {}\n\n",
        ": a remark\n\n",
        "event: x\ndata: {}\n\n",
        "\rdata: {}\r\n\n",
        "data: {}\r\n\r\n",
        "data:{}\n\n",
    ],
)
def test_a_stream_with_something_in_between(answer: Make, replay_model: ReplayModel, slipped_in: str) -> None:
    """The SDK also knows other ends of lines, lines that are remarks, events of several lines."""
    honest = answer(SAMPLED, stream=True)
    response = slipped_in.format(evil("no! ")).encode() + honest.response
    event = honest.receipt["event_log"][1]
    issued = ReceiptService(TestProvider()).issue(honest.request, response, event, "k", "c")
    assert failed(Replayer(replay_model).replay(issued, honest.request, response)) == ["replay"]
    assert replay(replay_model, honest).matches


def test_an_unfinished_stream_is_refused(answer: Make, replay_model: ReplayModel) -> None:
    a = answer(SAMPLED, stream=True)
    cut = a.response.removesuffix(b"data: [DONE]\n\n")
    with pytest.raises(AttestationError, match="did not end"):
        claimed_choices(cut, chat=True)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"\xff",
        b"data: x\n\ndata: [DONE]\n\n",
        b'{"choices":[{}]}',
        b"[]",
        b'{"choices":5}',
        b"data: [DONE]",
    ],
)
def test_responses_of_another_kind(raw: bytes) -> None:
    try:
        assert claimed_choices(raw, chat=True) == {}
    except AttestationError:
        return
    assert raw == b"data: [DONE]"


def test_streams_and_wholes_say_the_same() -> None:
    whole = json.dumps({"choices": [{"index": 0, "text": "ab\u2028c", "finish_reason": "stop"}]}, ensure_ascii=False)
    events = [
        {"choices": [{"index": 0, "text": t, "finish_reason": r}]}
        for t, r in (("ab", None), ("\u2028c", None), ("", "stop"))
    ]
    stream = "".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events) + "data: [DONE]\n\n"
    expected = {0: ClaimedChoice("ab\u2028c", "stop")}
    assert claimed_choices(whole.encode(), chat=False) == expected
    assert claimed_choices(stream.encode(), chat=False) == expected


def test_json_of_a_replay(answer: Make, replay_model: ReplayModel) -> None:
    data = replay(replay_model, answer(SAMPLED)).to_json()
    assert json.loads(json.dumps(data)) == data
    assert (data["verdict"], data["matches"], data["output_tokens"]) == ("MATCH", True, data["output_tokens"])
    assert set(data["timing"]) == {"load_s", "compute_s", "ms_per_token", "ms_per_output_token"}
