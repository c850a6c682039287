"""A program that calls kernels in the order of its arguments, and prints hashes of their results and machine code.

The output is JSON: per kernel the SHA-256 of its result, and of its instructions if this process compiled it.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.attention import NO_CAP, NO_WINDOW, attend_tokens
from numba_atomflow.ops.paged_attention import attend_paged
from numba_atomflow.ops.rms_norm import rms_norm

LENGTH, DIM, HEADS, KV_HEADS = 150, 64, 6, 2  # not multiples of the vector length


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def static(out: NDArray[np.float32]) -> None:
    q, keys, values = normal(HEADS * DIM), normal(LENGTH, KV_HEADS * DIM), normal(LENGTH, KV_HEADS * DIM)
    scores = np.empty((numba.config.NUMBA_NUM_THREADS, 1, LENGTH), np.float32)
    attend_tokens(q[None], keys, values, np.array([LENGTH - 1]), DIM, NO_WINDOW, NO_CAP, scores, out[None])


def paged(out: NDArray[np.float32]) -> None:
    q, keys, values = normal(HEADS * DIM), normal(LENGTH, KV_HEADS * DIM), normal(LENGTH, KV_HEADS * DIM)
    block_table, row, position = (
        np.arange(LENGTH // 10, dtype=np.int32)[None],
        np.zeros(1, np.int64),
        np.array([LENGTH - 1]),
    )
    scores = np.empty((numba.config.NUMBA_NUM_THREADS, LENGTH), np.float32)
    attend_paged(q[None], keys, values, block_table, row, position, 10, DIM, scores, out[None])


def norm(out: NDArray[np.float32]) -> None:
    rms_norm(normal(1, len(out)), normal(len(out)), np.float32(1e-5), out[None])


CASES: dict[str, tuple[Callable[[NDArray[np.float32]], None], Any, int]] = {
    "static": (static, attend_tokens, HEADS * DIM),
    "paged": (paged, attend_paged, HEADS * DIM),
    "norm": (norm, rms_norm, 201),
}


def instructions(kernel: Any) -> str | None:
    """Assembly without directives; symbols are numbered, because their names contain counters and addresses."""
    (compiled,) = kernel.overloads.values()
    if compiled.library._disable_inspection:  # loaded from the cache, which has only the object code
        return None
    names: dict[str, str] = {}
    lines = compiled.library.get_asm_str().splitlines()
    code = "\n".join(line for line in lines if line.startswith("\t") and not line.startswith("\t."))
    return re.sub(r"[\w.$]*(?:_ZN|\.const\.)[\w.$@]*", lambda match: names.setdefault(match[0], f"@{len(names)}"), code)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(names: list[str]) -> None:
    bits = {}
    for name in names:
        run, _, size = CASES[name]
        out = np.full(size, np.nan, np.float32)
        run(out)
        bits[name] = digest(out.tobytes())
    texts = {name: instructions(CASES[name][1]) for name in names}
    code = {name: text and digest(text.encode()) for name, text in texts.items()}
    print(json.dumps({"bits": bits, "code": code}))


if __name__ == "__main__":
    main(sys.argv[1:])
