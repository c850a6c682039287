"""Stop strings: the output is the text before the first match, for every split into pieces."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from numba_atomflow.text.codec import TextAssets, TextCodec
from numba_atomflow.text.stop_strings import StopStrings

STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def run(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stops = StopStrings(strings)
    out = "".join(stops.push(piece) for piece in pieces)
    return out + stops.flush(), stops.found


def first_to_complete(strings: list[str], text: str) -> tuple[str, str | None]:
    """The text before the first complete stop string, character by character."""
    for end in range(1, len(text) + 1):
        ended = [s for s in strings if text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(STOPS, st.text("abc", max_size=20))
@example(["aab"], "aaab")
@example(["abab", "bb"], "ababb")
def test_single_characters(strings: list[str], text: str) -> None:
    assert run(strings, list(text)) == first_to_complete(strings, text)


@given(STOPS, st.lists(st.text("abc", max_size=6), max_size=8))
def test_output_ends_before_the_stop_string_and_is_complete(strings: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    out, found = run(strings, pieces)
    if not any(s in text for s in strings):
        assert (out, found) == (text, None)
        return
    assert found in strings
    assert text.startswith(out + found)
    assert not any(s in out for s in strings)


@given(STOPS, st.lists(st.text("abc", max_size=6), max_size=8))
def test_only_a_possible_prefix_of_a_stop_string_is_held_back(strings: list[str], pieces: list[str]) -> None:
    stops, out, text = StopStrings(strings), "", ""
    for piece in pieces:
        out += stops.push(piece)
        text += piece
        if stops.found:
            assert stops.push("abc") == ""
            break
        held = text[len(out) :]
        assert held == "" or any(s.startswith(held) and s != held for s in strings)


@given(STOPS, st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=8))
@example(["abc"], [("a", True), ("b", False), ("c", True)])
def test_special_tokens_are_searched_and_not_returned(strings: list[str], pieces: list[tuple[str, bool]]) -> None:
    """The reference searches the whole text, and then removes the special tokens."""
    text = "".join(piece for piece, _ in pieces)
    visible = [shown for piece, shown in pieces for _ in piece]
    stops = StopStrings(strings)
    out = "".join(stops.push(piece, shown=shown) for piece, shown in pieces) + stops.flush()
    plain, found = run(strings, [piece for piece, _ in pieces])
    assert text.startswith(plain)
    assert (out, stops.found) == ("".join(c for c, shown in zip(plain, visible, strict=False) if shown), found)


def test_special_tokens_count_as_in_transformers() -> None:
    """Random tokens with special ones: generation stops at the same token."""
    criteria = pytest.importorskip("transformers.generation.stopping_criteria", reason="compares with transformers")
    torch = pytest.importorskip("torch", reason="transformers needs it for its criteria")
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer()
    expected = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    codec = TextCodec(TextAssets(tokenizer_json=tokenizer.to_str().encode()))
    rng = random.Random(0)
    letters = [codec.token_id(letter) for letter in "eos|"]
    for strings in (["<|eos|>"], ["s<|eos|>"], ["<|eos|>e"], ["|eos", "|><|"], ["o<|eos|><|eos|>s"], ["eo", "os"]):
        ends = criteria.StopStringCriteria(expected, strings)
        for _ in range(20):
            ids = rng.choices([1, 1, *letters], k=12)
            stops, stream = StopStrings(strings), codec.stream()
            for count, token in enumerate(ids, start=1):
                stops.push(stream.push(token))
                stops.push(stream.special_text(token), shown=False)
                assert (stops.found is not None) == bool(ends(torch.tensor([ids[:count]]), None)), (
                    strings,
                    ids[:count],
                )
                if stops.found:
                    break


def test_the_earlier_match_wins_then_the_longer() -> None:
    assert run(["world", "hello"], ["say hello world"]) == ("say ", "hello")
    assert run(["ab", "abc"], ["x abcd"]) == ("x ", "abc")


def test_a_stop_string_across_pieces_is_removed() -> None:
    stops = StopStrings(["<|end|>"])
    assert [stops.push(piece) for piece in ("text <", "|en", "d|", "> more")] == ["text ", "", "", ""]
    assert (stops.found, stops.flush()) == ("<|end|>", "")


def test_a_partial_match_is_returned_later() -> None:
    stops = StopStrings(["END"])
    assert [stops.push(piece) for piece in ("E", "N", "OUGH", "E")] == ["", "", "ENOUGH", ""]
    assert stops.flush() == "E"


def test_without_stop_strings_everything_passes_at_once() -> None:
    stops = StopStrings(())
    assert [stops.push("a"), stops.push(""), stops.push("bc"), stops.flush()] == ["a", "", "bc", ""]
