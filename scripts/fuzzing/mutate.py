"""Damage: what a bad disk, a bad converter or a bad person does to a file, as a function of a random generator."""

import json
import random
import sys
from collections.abc import Callable
from typing import Any

from fuzzing import gguf_parts

sys.set_int_max_str_digits(0)  # this process writes numbers of any length; the worker reads under Python's own limit

INTERESTING = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63)
_RAW = "\ue000raw{}\ue001"  # placeholder of JSON text that `json.dumps` would not write


def mutate(rng: random.Random, name: str, data: bytes) -> bytes:
    """A damaged version of a file; the suffix of its name selects damage that follows the format's structure."""
    structured = _STRUCTURED.get(name.rpartition(".")[2])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if structured is None or rng.random() < 0.3:
            data = _damage_bytes(rng, data)
            continue
        try:
            data = structured(rng, data)
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):  # damaged too much already
            data = _damage_bytes(rng, data)
    return data


# --- bytes ---------------------------------------------------------------------------------------------------------


def _damage_bytes(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(_BYTES)(rng, data)


def _place(rng: random.Random, data: bytes) -> int:
    """A position, most often where the header is."""
    end = len(data) if rng.random() < 0.4 else min(len(data), rng.choice((32, 256, 4096)))
    return rng.randrange(end) if end else 0


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[_place(rng, changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    at, width = _place(rng, data), rng.choice((1, 2, 4, 8))
    value = (rng.choice(INTERESTING) + rng.choice((-1, 0, 0, 1))) % 256**width
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _cut_out(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 4, 8, 100)) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at, count = _place(rng, data), rng.choice((1, 4, 8, 100, 5000))
    piece = rng.randbytes(count) if rng.random() < 0.5 else bytes([rng.choice(b'\0\x1b\xff[{"9 ')]) * count
    return data[:at] + piece + data[at:]


def _splice(rng: random.Random, data: bytes) -> bytes:
    """A piece of the file once more, over or between other bytes."""
    start, at, count = _place(rng, data), _place(rng, data), rng.choice((1, 8, 64, 1000))
    piece = data[start : start + count]
    return data[:at] + piece + data[at + rng.choice((0, len(piece))) :]


def _append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 1000)))


_BYTES = (_flip, _flip, _overwrite, _overwrite, _truncate, _cut_out, _insert, _splice, _append)


# --- JSON ----------------------------------------------------------------------------------------------------------


def _damage_json(rng: random.Random, data: bytes) -> bytes:
    return damage_record(rng, json.loads(data)).encode("utf-8", "surrogatepass")


def _damage_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = _damage_json(rng, lines[i])
    return b"\n".join(lines)


def damage_record(rng: random.Random, record: Any) -> str:
    """JSON text of a record in which one thing is wrong."""
    raws: list[str] = []
    holder = [record]
    parent, key = _some_place(rng, holder)
    value = parent[key]
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.8:  # JSON within JSON
        parent[key] = damage_record(rng, json.loads(value))
    else:
        rng.choice(_PLACES)(rng, holder, parent, key, raws)
    text = json.dumps(holder[0])
    for i, raw in enumerate(raws):
        text = text.replace(json.dumps(_RAW.format(i)), raw)
    return text


def _some_place(rng: random.Random, holder: list[Any]) -> tuple[Any, Any]:
    """A container within a record, and one of its keys; places near the root are as likely as all that is deep."""
    parent, key = holder, 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key


def _set(rng: random.Random, holder: list[Any], parent: Any, key: Any, raws: list[str]) -> None:
    """Another value, of another type or out of range."""
    value = rng.choice(_VALUES)(rng, parent[key])
    if isinstance(value, Raw):
        raws.append(value.text)
        value = _RAW.format(len(raws) - 1)
    parent[key] = value


def _remove(rng: random.Random, holder: list[Any], parent: Any, key: Any, raws: list[str]) -> None:
    if parent is not holder:
        del parent[key]


def _rename(rng: random.Random, holder: list[Any], parent: Any, key: Any, raws: list[str]) -> None:
    if isinstance(parent, dict):
        parent[rng.choice((str(key) + "x", "", "\x1b[31m", "n" * 5000, "__class__", "self", "\ud800"))] = parent.pop(
            key
        )


def _duplicate(rng: random.Random, holder: list[Any], parent: Any, key: Any, raws: list[str]) -> None:
    if isinstance(parent, list) and parent is not holder:
        parent.insert(key, parent[key])
    elif isinstance(parent[key], dict) and parent[key]:
        text = json.dumps(parent[key])
        raws.append(text[:-1] + "," + text[1:])
        parent[key] = _RAW.format(len(raws) - 1)


def _move(rng: random.Random, holder: list[Any], parent: Any, key: Any, raws: list[str]) -> None:
    other, place = _some_place(rng, holder)
    parent[key] = json.loads(json.dumps(other[place]))


_PLACES = (_set, _set, _set, _set, _remove, _rename, _duplicate, _move)


class Raw:
    """JSON text as it is."""

    def __init__(self, text: str) -> None:
        self.text = text


def _scaled(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return rng.choice(INTERESTING)
    return rng.choice((-value, value + 1, value - 1, value * 2, value // 2, value + 0.5, value * 10**9, float(value)))


def _retyped(rng: random.Random, value: Any) -> Any:
    return rng.choice(([value], {"content": value}, str(value), len(str(value)), [value] * 300))


def _deep(rng: random.Random, value: Any) -> Any:
    depth = rng.choice((50, 900, 100_000))
    return Raw("[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth)


def _text(rng: random.Random, value: Any) -> Any:
    return rng.choice(
        (
            "",
            " ",
            "x" * 5000,
            "\ud800",
            "\x1b[2J\x07",
            "\0",
            "../../etc/passwd",
            "🙂" * 20,
            "1e5",
            "None",
            "a\nb",
            "\u202e",
        )
    )


def _number(rng: random.Random, value: Any) -> Any:
    special = ("NaN", "Infinity", "-Infinity", "1e400", "-0.0", "5e-324", "1e-40", "3.4e38", "9" * 300, "9" * 4001)
    return (
        Raw(rng.choice((*special, "9" * 10_000)))
        if rng.random() < 0.5
        else rng.choice((1, -1)) * rng.choice(INTERESTING)
    )


def _constant(rng: random.Random, value: Any) -> Any:
    return rng.choice((None, True, False, 0, 1, -1, 0.5, [], {}))


_VALUES: tuple[Callable[[random.Random, Any], Any], ...] = (
    _constant,
    _constant,
    _number,
    _text,
    _scaled,
    _scaled,
    _retyped,
)
_VALUES += (_deep,)


# --- safetensors ---------------------------------------------------------------------------------------------------


def _damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.1:
        other = rng.choice((0, 1, 2, length + 1, length - 1, 2**63, len(data) - 8))
        return (other % 2**64).to_bytes(8, "little") + header + body
    text = _damage_json(rng, header)
    if rng.random() < 0.5:
        text += b" " * (-(len(text) - length) % 128)  # the data stay aligned
    return len(text).to_bytes(8, "little") + text + body


# --- templates -----------------------------------------------------------------------------------------------------

_JINJA = (
    "{% for m in messages %}", "{% endfor %}", "{% if messages[0]['role'] == 'system' %}", "{% else %}", "{% endif %}",
    "{{ messages[-1]['content'] }}", "{{ bos_token }}", "{% set x = namespace(n=0) %}", "{% set x.n = x.n + 1 %}",
    "{{ raise_exception('no') }}", "{{ messages|tojson }}", "{{ 'a' * 9999 }}", "{{ 1 / 0 }}", "{{ [1] * 10 ** 9 }}",
    "{% for i in range(99999) %}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ loop.index0 }}",
    "{{ strftime_now('%Y') }}", "{{ '%999999999d' % 1 }}", "{{ 'x'.center(10 ** 9) }}", "{{ x|length }}", "{{", "{%",
    "{#", "#}", "%}", "}}", "{{ 9" + "9" * 5000 + " }}", "{{ '" + "\x1b" + "[2J' }}", "{{ ''|map('upper')|list }}",
    "{% generation %}", "{% endgeneration %}", "{% break %}", "{% include 'x' %}", "{{ self.__class__ }}",
    "{{ (" + "(" * 300 + "1" + ")" * 300 + ") }}", "{{ messages[0].content.split('.')[9] }}", "{{ '\\ud800' }}",
    "\udc80", "{{ 2 ** 9**9 }}",
)  # fmt: skip


def _damage_template(rng: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "surrogateescape")
    places = [i for i, character in enumerate(text) if character in "{}"] or [0]
    at, end = sorted((rng.choice(places), rng.choice(places)))
    match rng.randrange(4):
        case 0:
            text = text[:at] + rng.choice(_JINJA) + text[at:]
        case 1:
            text = text[:at] + text[end:]
        case 2:
            text = text[:end] + text[at:end] * rng.choice((1, 2, 30)) + text[end:]
        case 3:
            text = text[:at] + rng.choice(_JINJA) + text[at:end] + rng.choice(_JINJA) + text[end:]
    return text.encode("utf-8", "surrogateescape" if rng.random() < 0.5 else "replace")


_STRUCTURED: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "json": _damage_json,
    "jsonl": _damage_lines,
    "safetensors": _damage_safetensors,
    "gguf": gguf_parts.damage,
    "jinja": _damage_template,
}
