"""A smaller case with the same fault: whole files, then differing bytes, then JSON values, then pieces of text go."""

import json
from collections.abc import Callable, Sequence
from typing import Any

Files = dict[str, bytes]
Fails = Callable[[Files], bool]

MOST_RUNS = 300
_LARGEST_TEXT = 100_000  # bytes; files above it are not cut into pieces
_LONGEST_VALUE = 40  # characters; longer JSON strings are tried shorter


class _OutOfRunsError(Exception):
    pass


def minimise(files: Files, base: Files, fails: Fails, runs: int = MOST_RUNS) -> Files:
    """The smallest variant of `files` found within some runs for which `fails` still holds.

    Args:
        files: a case for which it holds.
        base: the sound files that it was mutated from.
    """
    best, left = dict(files), runs

    def better(candidate: Files) -> bool:
        nonlocal best, left
        if not left:
            raise _OutOfRunsError
        left -= 1
        found = fails(candidate)
        if found:
            best = candidate
        return found

    try:
        for name in sorted(set(files) | set(base)):
            if best.get(name) != base.get(name):
                better({key: data for key, data in (best | {name: base.get(name)}).items() if data is not None})
        for name in [name for name in best if best[name] != base.get(name)]:
            if len(base.get(name, b"")) == len(best[name]):
                _revert_bytes(best, name, base[name], better)
            elif name.endswith("json"):
                _shrink_json(best, name, better)
            if len(best[name]) <= _LARGEST_TEXT and name.endswith(("json", "jsonl", "jinja")):
                _drop_pieces(best, name, better)
    except _OutOfRunsError:
        pass
    return best


def ddmin(items: Sequence[Any], fails: Callable[[Sequence[Any]], bool]) -> Sequence[Any]:
    """A part of `items` for which `fails` holds, and for no part of it with one item less that was tried.

    Source: Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002).
    """
    pieces = 2
    while len(items) >= 2:
        size = -(-len(items) // pieces)
        for start in range(0, len(items), size):
            rest = [*items[:start], *items[start + size :]]
            if fails(rest):
                items, pieces = rest, max(pieces - 1, 2)
                break
        else:
            if size == 1:
                break
            pieces = min(2 * pieces, len(items))
    return items


def _revert_bytes(best: Files, name: str, sound: bytes, better: Fails) -> None:
    """Leave as few bytes as possible that differ from the sound file."""
    damaged = best[name]
    places = [i for i in range(len(sound)) if sound[i] != damaged[i]]

    def with_places(kept: Sequence[int]) -> bytes:
        data = bytearray(sound)
        for i in kept:
            data[i] = damaged[i]
        return bytes(data)

    ddmin(places, lambda kept: better(best | {name: with_places(kept)}))


def _shrink_json(best: Files, name: str, better: Fails) -> None:
    """Remove keys and items, and shorten texts, from the root down."""
    try:
        record = json.loads(best[name])
    except (ValueError, RecursionError):
        return
    paths: list[tuple[Any, ...]] = [()]
    while paths:
        path = paths.pop(0)
        value = _value_at(record, path)
        if isinstance(value, str) and len(value) > _LONGEST_VALUE:
            shorter = _replaced(record, path, value[:_LONGEST_VALUE])
            record = shorter if better(best | {name: _text(shorter)}) else record
        if not isinstance(value, dict | list):
            continue
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in reversed(keys):
            smaller = _removed(record, (*path, key))
            record = smaller if better(best | {name: _text(smaller)}) else record
        left = _value_at(record, path)
        paths += [(*path, key) for key in (left if isinstance(left, dict) else range(len(left)))]


def _text(record: Any) -> bytes:
    return json.dumps(record).encode()


def _value_at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def _replaced(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(record))
    if not path:
        return value
    _value_at(copy, path[:-1])[path[-1]] = value
    return copy


def _removed(record: Any, path: tuple[Any, ...]) -> Any:
    copy = json.loads(json.dumps(record))
    del _value_at(copy, path[:-1])[path[-1]]
    return copy


def _drop_pieces(best: Files, name: str, better: Fails) -> None:
    """Cut out pieces of a text."""
    ddmin(list(best[name]), lambda kept: better(best | {name: bytes(kept)}))
