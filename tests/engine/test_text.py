"""Text: ids and back, deltas that add up to the whole, stop strings across any boundary."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from veriattn.engine.text import IncrementalDecoder, StopMatcher, TextCodec
from veriattn.errors import ModelError, UsageError

SPECIALS = ["<s>", "</s>", "<|im_end|>"]
PLAIN_ADDED = ["<think>", "two words", "é!"]


def byte_alphabet() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def tokenizer_json(decoder: Any, tokens: list[str], **changes: Any) -> str:
    """SPECIALS are ids 0 to 2, `tokens` follow, PLAIN_ADDED come last."""
    vocab = {t: i for i, t in enumerate([*SPECIALS, *tokens])}
    added = [(i, t, True) for i, t in enumerate(SPECIALS)]
    added += [(len(vocab) + i, t, False) for i, t in enumerate(PLAIN_ADDED)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [],
    }  # fmt: skip
    description = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "added_tokens": [{"id": i, "content": t, "special": s, **flags} for i, t, s in added],
        "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip
    return json.dumps(description | changes)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_LEVEL_PRE = BYTE_LEVEL | {"use_regex": True}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
LLAMA = {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]}
GEMMA = {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]}
PLAIN = {"type": "Sequence", "decoders": [REPLACE, {"type": "Fuse"}, STRIP | {"start": 2}]}

BYTE_TOKENS = [f"<0x{b:02X}>" for b in (0x41, 0x20, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC3)]
ODD_BYTE_TOKENS = ["<0xe4>", "<0xZZ>", "<0x4>", "<0x041>"]
PIECES = ["▁", "▁▁", "▁a", "b", "a▁b▁", "你", " ", "é", *BYTE_TOKENS, *ODD_BYTE_TOKENS]
# Whole characters and their parts, so that splits over tokens are common.
BYTE_PIECES = [*byte_alphabet(), "ä½", "ł", "ðŁ", "ĺ", "Ġa", "ä½łä", "Ċ"]


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


CODECS = {
    "byte_level": (BYTE_LEVEL, list(dict.fromkeys(BYTE_PIECES))),
    "byte_level_sequence": ({"type": "Sequence", "decoders": [BYTE_LEVEL]}, list(dict.fromkeys(BYTE_PIECES))),
    "llama": (LLAMA, PIECES),
    "gemma": (GEMMA, PIECES),
    "no_fallback": (PLAIN, PIECES),
    **{f"metaspace_{s}": (metaspace(s), PIECES) for s in ("always", "first", "never")},
}


def make_codec(name: str, **changes: Any) -> TextCodec:
    decoder, tokens = CODECS[name]
    pre = BYTE_LEVEL_PRE if name.startswith("byte_level") else None
    size = len(SPECIALS) + len(tokens) + len(PLAIN_ADDED)
    return TextCodec(tokenizer_json(decoder, tokens, pre_tokenizer=pre, **changes), None, 0, (1, 2), False, size + 8)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_decoded_text(name: str, data: st.DataObject) -> None:
    codec = make_codec(name)
    # The last ids are padding of the vocabulary, which no token belongs to.
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=24))
    decoder = IncrementalDecoder(codec)
    deltas = [decoder.push(i) for i in ids]
    assert "".join(deltas) + decoder.finish() == codec.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_goes_through_a_byte_level_tokenizer(text: str) -> None:
    codec = make_codec("byte_level")
    decoder = IncrementalDecoder(codec)
    ids = codec.encode(text)
    expected = text
    for special in SPECIALS:
        expected = expected.replace(special, "")
    assert "".join(map(decoder.push, ids)) + decoder.finish() == expected


def test_a_character_split_over_tokens_comes_out_once_it_is_whole() -> None:
    codec = make_codec("byte_level")
    ids = codec.encode("a€")
    decoder = IncrementalDecoder(codec)
    assert [decoder.push(i) for i in ids] == ["a", "", "", "€"]
    assert decoder.finish() == ""
    assert decoder.push(ids[1]) == "" and decoder.finish() == "\ufffd"
    assert decoder.push(ids[0]) == "a"


def test_special_tokens_in_a_prompt_are_recognised_and_not_shown() -> None:
    codec = make_codec("byte_level")
    ids = codec.encode("a<|im_end|>b")
    assert ids[1] == SPECIALS.index("<|im_end|>") and len(ids) == 3
    assert codec.decode(ids) == "ab" and codec.special_texts == tuple(SPECIALS)
    assert codec.token_bytes(ids[1]) == b"<|im_end|>" and codec.token_bytes(codec.vocab_size - 1) == b""


def test_bos_comes_where_the_model_wants_it() -> None:
    decoder, tokens = CODECS["byte_level"]
    text = tokenizer_json(decoder, tokens, pre_tokenizer=BYTE_LEVEL_PRE)
    codec = TextCodec(text, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", 0, (1,), True, 1000)
    plain = codec.encode("a", add_bos=False)
    assert codec.encode("a") == [0, *plain]
    assert codec.encode_chat([{"role": "user", "content": "a"}]) == [0, *plain, 1]
    with pytest.raises(ModelError):
        TextCodec(text, None, None, (1,), True, 1000)


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    padding = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<s>",
    }  # fmt: skip
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    codec = make_codec("byte_level", padding=padding, truncation=truncation)
    assert codec.decode(codec.encode("abcdefgh")) == "abcdefgh"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UsageError):
        make_codec("byte_level").encode("a\ud800")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": []},
        {"type": "Sequence", "decoders": [REPLACE, {"type": "Fuse"}, STRIP | {"stop": 1}]},
        {"type": "Sequence", "decoders": [STRIP, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [REPLACE | {"pattern": {"Regex": "a+"}}, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [BYTE_LEVEL, BYTE_LEVEL]},
    ],
)
def test_decoders_that_would_not_be_followed_exactly_are_refused(decoder: Any) -> None:
    text = tokenizer_json(decoder, PIECES)
    Tokenizer.from_str(text)
    with pytest.raises(ModelError, match="decoder"):
        TextCodec(text, None, None, (), False, 1000)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"version": "1.0"}'])
def test_damaged_tokenizers_are_refused(text: str) -> None:
    with pytest.raises(ModelError):
        TextCodec(text, None, None, (), False, 1000)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    decoder, tokens = CODECS["llama"]
    text = tokenizer_json(decoder, tokens)
    size = len(SPECIALS) + len(tokens) + len(PLAIN_ADDED)
    TextCodec(text, None, None, (), False, size)
    with pytest.raises(ModelError):
        TextCodec(text, None, None, (), False, size - 1)


# --- stop strings ---------------------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification, one character at a time: the first stop string to be complete ends the text before it."""
    for end in range(1, len(text) + 1):
        whole = [s for s in stops if text[:end].endswith(s)]
        if whole:
            longest = max(whole, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=600, deadline=None)
@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
)
def test_stop_strings_do_not_depend_on_boundaries(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for n, piece in enumerate(pieces):
        shown += matcher.push(piece)
        so_far, matched = cut("".join(pieces[: n + 1]), stops)
        assert so_far.startswith(shown) and matcher.matched == matched
        if matched is None:
            # Not more than necessary is held back.
            held = so_far[len(shown) :]
            assert held == "" or any(s.startswith(held) and s != held for s in stops)
    shown += matcher.finish()
    assert (shown, matcher.matched) == cut("".join(pieces), stops)
    assert matcher.finish() == ""


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(p) for p in ("one E", "ND two", " three")] == ["one ", "", ""]
    assert matcher.matched == "END" and matcher.finish() == ""


def test_a_false_start_is_given_back() -> None:
    matcher = StopMatcher(("END", "ENTER"))
    assert [matcher.push(p) for p in ("EN", "T", "EX", "E")] == ["", "", "ENTEX", ""]
    assert matcher.matched is None and matcher.finish() == "E"


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopMatcher()
    assert matcher.push("a\n") == "a\n" and matcher.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError):
        StopMatcher(["a", ""])
