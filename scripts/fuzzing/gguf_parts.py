"""Parses a GGUF file and writes it again with one fault in its metadata or its list of tensors."""

import random
import struct
from dataclasses import dataclass
from typing import Any

_LAYOUTS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_NUMBERS = (0, 1, 2, 3, 7, 31, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)
_TEXTS = (
    b"",
    b" ",
    b"gpt2",
    b"llama",
    b"\xff\xfe",
    b"\x1b[2J",
    b"\0",
    b"x" * 5000,
    "▁".encode(),
    "🙂".encode(),
    b"\xed\xa0\x80",
)


@dataclass
class Field:
    """A metadata field: key, type and stored value; of an array, item type and items."""

    key: bytes
    kind: int
    value: bytes
    item_kind: int = 0
    items: list[bytes] | None = None


@dataclass
class Entry:
    """A tensor's entry in the list."""

    name: bytes
    shape: list[int]
    kind: int
    offset: int


def damage(rng: random.Random, data: bytes) -> bytes:
    """The file with one field or tensor entry changed.

    Raises:
        ValueError, IndexError: the file is damaged already.
    """
    fields, entries, body = _parse(data)
    if rng.random() < 0.75:
        _damage_fields(rng, fields)
    else:
        _damage_entries(rng, entries)
    return _serialize(fields, entries, body)


def _damage_fields(rng: random.Random, fields: list[Field]) -> None:
    i = rng.randrange(len(fields))
    field = fields[i]
    match rng.randrange(10):
        case 0 | 1 as case:
            _drop_or_repeat(fields, i, repeat=case == 1)
        case 2:
            field.key = rng.choice((field.key + b"x", b"", b"general.alignment", rng.choice(fields).key, *_TEXTS))
        case 3:
            other = rng.choice(fields)
            field.kind, field.value, field.item_kind, field.items = (
                other.kind,
                other.value,
                other.item_kind,
                other.items,
            )
        case 4:
            field.kind = rng.choice((*range(14), 2**32 - 1))
        case 5:
            field.kind, field.value = rng.choice(list(_LAYOUTS)), struct.pack("<Q", rng.choice(_NUMBERS))
            field.value, field.items = field.value[: struct.calcsize(_LAYOUTS[field.kind])], None
        case _ if field.items:
            _damage_items(rng, field)
        case _ if field.kind == _STRING:
            text = rng.choice((*_TEXTS, field.value[8:] + b"x", field.value[8:-1]))
            field.value = len(text).to_bytes(8, "little") + text
        case _:
            field.value = _number(rng, len(field.value))


def _drop_or_repeat(items: list[Any], i: int, *, repeat: bool) -> None:
    if repeat:
        items.insert(i, items[i])
    else:
        del items[i]


def _damage_items(rng: random.Random, field: Field) -> None:
    items = list(field.items or ())
    i = rng.randrange(len(items))
    match rng.randrange(5):
        case 0:
            items = items[:i]
        case 1:
            items.insert(i, items[0])
        case 2:
            items *= 2
        case 3:
            items[i] = rng.choice(items)
        case 4 if field.item_kind == _STRING:
            text = rng.choice(_TEXTS)
            items[i] = len(text).to_bytes(8, "little") + text
        case 4:
            items[i] = _number(rng, len(items[i]))
    field.items = items


def _number(rng: random.Random, width: int) -> bytes:
    special = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 1e-40, 3e38)))
    return (special if width == 4 and rng.random() < 0.3 else struct.pack("<Q", rng.choice(_NUMBERS)))[:width].ljust(
        width, b"\0"
    )


def _damage_entries(rng: random.Random, entries: list[Entry]) -> None:
    i = rng.randrange(len(entries))
    entry = entries[i]
    match rng.randrange(7):
        case 0 | 1 as case:
            _drop_or_repeat(entries, i, repeat=case == 1)
        case 2:
            entry.name = rng.choice((*_TEXTS, entry.name + b"x", rng.choice(entries).name))
        case 3:
            entry.shape[rng.randrange(len(entry.shape))] = rng.choice(_NUMBERS)
        case 4:
            entry.shape = rng.choice(([], entry.shape * 2, [1, *entry.shape], entry.shape[::-1], [2**40] * 40))
        case 5:
            entry.kind = rng.choice((*range(40), 2**32 - 1))
        case 6:
            entry.offset = rng.choice((*_NUMBERS, entry.offset + 32, entry.offset + 1, rng.choice(entries).offset))


def _parse(data: bytes) -> tuple[list[Field], list[Entry], bytes]:
    reader = _Reader(data)
    if reader.take(4) != b"GGUF":
        raise ValueError("no GGUF file")
    _, tensor_count, field_count = reader.number(4), reader.number(8), reader.number(8)
    if field_count > 1000 or tensor_count > 1000:
        raise ValueError("damaged")
    fields = [reader.field() for _ in range(field_count)]
    entries = [reader.entry() for _ in range(tensor_count)]
    return fields, entries, data[-(-reader.at // _ALIGNMENT) * _ALIGNMENT :]


def _serialize(fields: list[Field], entries: list[Entry], body: bytes) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(fields))]
    for field in fields:
        parts += [_text(field.key), struct.pack("<I", field.kind)]
        if field.items is None:
            parts.append(field.value)
        else:
            parts += [struct.pack("<IQ", field.item_kind, len(field.items)), *field.items]
    for entry in entries:
        shape = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape)
        parts += [_text(entry.name), shape, struct.pack("<IQ", entry.kind, entry.offset % 2**64)]
    head = b"".join(parts)
    return head + bytes(-len(head) % _ALIGNMENT) + body


def _text(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.at, self._data = 0, data

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise ValueError("cut short")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self) -> bytes:
        return self.take(self.number(8))

    def value(self, kind: int) -> bytes:
        if kind == _STRING:
            text = self.text()
            return len(text).to_bytes(8, "little") + text
        return self.take(struct.calcsize(_LAYOUTS[kind]))

    def field(self) -> Field:
        key, kind = self.text(), self.number(4)
        if kind != _ARRAY:
            return Field(key, kind, self.value(kind))
        item_kind, count = self.number(4), self.number(8)
        if count > len(self._data):
            raise ValueError("cut short")
        return Field(key, kind, b"", item_kind, [self.value(item_kind) for _ in range(count)])

    def entry(self) -> Entry:
        name, dimensions = self.text(), self.number(4)
        if dimensions > 8:
            raise ValueError("damaged")
        shape = [self.number(8) for _ in range(dimensions)]
        return Entry(name, shape, self.number(4), self.number(8))
