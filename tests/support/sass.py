"""What machine code of sm_90 consists of, read from a cubin without a disassembler.

An instruction is 16 bytes; the lowest 12 bits are its operation. Source: compared with the output of nvdisasm 13.0.
"""

import struct
from itertools import pairwise

import numpy as np

# HGMMA with A from shared memory and from registers, QGMMA (FP8) with A from registers.
_OPERATIONS = {
    0x9F0: "HGMMA",
    0xDF0: "HGMMA",
    0xDF3: "QGMMA",
    0x308: "MUFU",
    0x387: "STL",
    0x983: "LDL",
    0xFAE: "LDGSTS",
}
_WARPGROUP = 0x9C5  # one operation
_DEPBAR = 1 << 47  # of it: wait for wgmmas; without this bit: fence (ARRIVE)


def operations(code: bytes) -> list[str]:
    """Of the only kernel of a cubin, those that are looked for: HGMMA, QGMMA, MUFU, ARRIVE (fence of wgmmas), DEPBAR
    (wait for them), LDL and STL (local memory), LDGSTS (`cp.async`); "" for every other.
    """
    (table,), (size, count, names) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HHH", code, 58)
    headers = [struct.unpack_from("<IIQQQQ", code, table + size * i) for i in range(count)]
    start = headers[names][4]
    sections = [header for header in headers if code[start + header[0] :].startswith(b".text.")]
    assert len(sections) == 1, "not one kernel"
    _, _, _, _, offset, length = sections[0]
    words = np.frombuffer(code, "<u8", length // 8, offset)[::2]
    found = []
    for word in words.tolist():
        operation = word & 0xFFF
        if operation == _WARPGROUP:
            found.append("DEPBAR" if word & _DEPBAR else "ARRIVE")
        else:
            found.append(_OPERATIONS.get(operation, ""))
    return found


def between(operations: list[str], first: str, second: str) -> list[list[str]]:
    """What lies between each `first` and the next of HGMMA, QGMMA, ARRIVE and DEPBAR, where that is a `second`."""
    bounds = [i for i, name in enumerate(operations) if name in {"HGMMA", "QGMMA", "ARRIVE", "DEPBAR"}]
    return [operations[i + 1 : j] for i, j in pairwise(bounds) if (operations[i], operations[j]) == (first, second)]
