"""The wire format of Protocol Buffers: a message as numbered fields.

Source: https://protobuf.dev/programming-guides/encoding. Messages of SentencePiece need no more than this, and the
bounds of an untrusted file are checked here.
"""

from collections.abc import Iterator

_MAX_VARINT = 10  # bytes of 64 bits, 7 in each


def message_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field, in their order: an integer (varint), or the bytes of any other type.

    Raises:
        ValueError: the data are no message, or are cut off.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                value, position = _varint(data, position)
                yield key >> 3, value
                continue
            case 1:
                length = 8
            case 2:
                length, position = _varint(data, position)
            case 5:
                length = 4
            case wire_type:
                raise ValueError(f"there is no wire type {wire_type} (byte {position - 1})")
        if length > len(data) - position:
            raise ValueError(f"{length} bytes are announced at byte {position}, and {len(data) - position} follow")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer of up to 64 bits, and the position after it."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"an integer at byte {position} has no end")
