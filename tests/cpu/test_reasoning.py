"""Reasoning in a reply: found at its beginning only, whatever the pieces in which it comes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numba_atomflow.text.reasoning import ReasoningSplitter, SplitReply, prompt_opening, split_reasoning

CASES = [  # text, whether the prompt has opened it, reasoning, answer
    ("<think>\nWhy?\n</think>\n\nBecause.", False, "Why?", "Because."),
    ("\n<think>a b</think>c\n", False, "a b", "c\n"),
    ("Why?\n</think>\n\nBecause.", True, "Why?", "Because."),
    ("<think>\n\n</think>\n\nBecause.", False, "", "Because."),
    ("<think>not at its end ", False, "not at its end", ""),
    ("not at its end", True, "not at its end", ""),
    ("<think>a</think>", False, "a", ""),
    ("<think>a</think> \n", False, "a", ""),
    ("Say <think>a</think>.", False, "", "Say <think>a</think>."),
    ("  indented <think>", False, "", "  indented <think>"),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("<think>a < b </thin </think>c", False, "a < b </thin", "c"),
    ("<thin", False, "", "<thin"),
    ("a</thin", True, "a</thin", ""),
    ("", False, "", ""),
    (" \n", False, "", " \n"),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "answer"), CASES)
def test_a_complete_reply(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, opened) == SplitReply(reasoning, answer)


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", " ", "\n", "é"])).map("".join),
    opened=st.booleans(),
    cuts=st.lists(st.integers(0, 60)),
)
@settings(max_examples=50)
def test_pieces_give_the_same_as_the_whole(text: str, opened: bool, cuts: list[int]) -> None:
    splitter = ReasoningSplitter(opened)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = []
    for start, end in zip([0, *ends], ends, strict=False):
        pieces += splitter.push(text[start:end])
    pieces += splitter.flush()
    assert all(piece.text for piece in pieces)
    kinds = [piece.is_reasoning for piece in pieces]
    assert kinds == sorted(kinds, reverse=True)  # no reasoning after the answer has begun
    joined = SplitReply(*("".join(p.text for p in pieces if p.is_reasoning == which) for which in (True, False)))
    assert joined == split_reasoning(text, opened)


def test_reasoning_comes_at_once_and_not_at_its_end() -> None:
    splitter = ReasoningSplitter()
    assert [list(splitter.push(text)) for text in ("<th", "ink>One ", "two", "</think>", "Three")] == [
        [],
        [("One", True)],
        [(" two", True)],
        [],
        [("Three", False)],
    ]


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|assistant|><think>\n", "<think>\n"),
        ("<think>", "<think>"),
        ("<think>\n\n</think>\n\n", ""),
        ("<|assistant|>", ""),
        ("", ""),
    ],
)
def test_a_prompt_that_opens_the_reasoning(prompt: str, opening: str) -> None:
    assert prompt_opening(prompt) == opening
