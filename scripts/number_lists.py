"""Command line options that are numbers from a least one on, or lists of numbers."""

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def list_of(number: Callable[[str], Number], example: str) -> Callable[[str], list[Number]]:
    """The `type` of an option whose value looks like `example`.

    Args:
        number: `int` or `float`.
    """
    what = "whole numbers" if number is int else "numbers"

    def parse(text: str) -> list[Number]:
        try:
            return [number(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {what} such as {example}") from None

    return parse


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that is a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return number

    return parse
