"""The program that the Nsight wrappers run: its NVTX ranges."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.model.step import SAMPLE

pytest.importorskip("nvtx", reason="nvtx names ranges: pip install '.[profile]'")
import traced_decode

DEPTH, TOKENS = 5, 2


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ranges that are opened (+) and closed (-), in order."""
    log: list[str] = []
    opened: list[str] = []

    def push(name: str) -> None:
        opened.append(name)
        log.append(f"+{name}")

    def pop() -> None:
        log.append(f"-{opened.pop()}")

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        push(name)
        yield
        pop()

    nvtx = traced_decode.nvtx
    monkeypatch.setattr(nvtx, "push_range", push)
    monkeypatch.setattr(nvtx, "pop_range", pop)
    monkeypatch.setattr(nvtx, "annotate", annotate)
    monkeypatch.setattr(nvtx, "start_range", push)
    monkeypatch.setattr(nvtx, "end_range", lambda _handle: pop())
    return log


def test_only_decoding_is_captured_with_a_range_per_token_and_op(
    ranges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = DEPTH + traced_decode.WARM_UP + TOKENS
    with Engine.random(tiny_geometry(), "cpu", positions, threads=1) as engine:
        decode = engine.backend.decode
        monkeypatch.setattr(engine.backend, "decode", lambda: (ranges.append(f"decode {engine.position}"), decode()))
        traced_decode.traced_decode(engine, DEPTH, TOKENS, 1)
        ops = [op.name for op in engine.backend.step(1, SAMPLE)]
        assert engine.position == engine.max_seq_len
    warm_up = [f"decode {DEPTH + 1}", f"decode {DEPTH + 2}"]
    tokens = [[f"+token {i}", f"decode {DEPTH + 3 + i}", f"-token {i}"] for i in range(TOKENS)]
    one_by_one = [mark + name for name in ops for mark in "+-"]
    assert ranges == [
        *warm_up,
        "+decode",
        *tokens[0],
        *tokens[1],
        "+ops of token 0",
        *one_by_one,
        "-ops of token 0",
        "-decode",
    ]


def test_the_record_of_ops_has_their_compulsory_reads() -> None:
    with Engine.random(tiny_geometry(), "cpu", 16, threads=1) as engine:
        records = {record["name"]: record["bytes"] for record in traced_decode.op_records(engine, 10)}
        g = engine.geometry
        assert records["layer.1.attention"] == 2 * 10 * g.kv_dim * 4
        ops = {op.name: op.weight_bytes for op in engine.backend.step(1, SAMPLE)}
        assert records["layer.1.down"] == ops["layer.1.down"] > 0
