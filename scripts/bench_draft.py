"""What a draft model gains on the CPU, by the number of tokens that it proposes in each step.

    python scripts/bench_draft.py large.safetensors small.safetensors                       # tests/workloads/chat.jsonl
    python scripts/bench_draft.py large.safetensors small.safetensors --workload prompts.jsonl --lengths 1,2,4,7

Each prompt is decoded greedily with every number of tokens and with the number that the engine chooses, by turns; the
replies must be the same. Times are CPU time of the process, divided by its threads: other load on the machine disturbs
them less than the clock. Threads that wait do not spin (OMP_WAIT_POLICY), or waiting would count as work.

Last, what the host adds to a proposal: the draft model's steps are left out, and only what is around them is timed.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before numba starts its threads

from number_lists import list_of

from numba_atomflow import AtomFlowError, Engine, SamplingParams
from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.engine import TokenGeneration
from numba_atomflow.host.machine import commit, machine_record
from numba_atomflow.perf.workload import Prompt, read_workload
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

WORKLOAD = Path(__file__).parents[1] / "tests" / "workloads" / "chat.jsonl"
ADAPTIVE = "chosen"
SHORT, PROPOSALS, PROPOSED = 100, 90, 4  # of `_overhead`: tokens of the shorter text, and how much it grows
MOST_POSITIONS = SHORT + PROPOSALS + PROPOSED - 1


class FixedLength:
    """Proposes as many tokens as it is told, whatever they cost."""

    def __init__(self, draft: Engine, length: int) -> None:
        self._draft, self._length = draft, length

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """What the draft model generates."""
        count = min(limit, self._length, self._draft.max_seq_len + 1 - len(token_ids))
        return self._draft.continue_greedily(token_ids, count).tokens if count > 0 else []

    def observe(self, result: StepResult) -> None:
        """No effect: the length is fixed."""


class Decoded(NamedTuple):
    """A reply, and CPU seconds per thread from its first token to its last."""

    reply: TokenGeneration
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables or JSON; the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if min(given.lengths) < 1 or given.tokens < 2 or given.repeats < 1:
        parser.error("--lengths and --repeats are 1 or more, --tokens 2 or more")
    try:
        prompts = read_workload(given.workload)
        with (
            Engine.load(given.draft, "cpu", threads=given.threads) as draft,
            Engine.load(given.model, "cpu", threads=given.threads) as engine,
        ):
            engine.use_draft(draft)
            _check_positions(draft)
            results = _results(engine, draft, prompts, given)
            overheads = {length: _overhead(draft, length) for length in (SHORT, draft.max_seq_len - SHORT)}
            device = engine.backend.device
    except AtomFlowError as error:
        print(f"bench_draft: {error}", file=sys.stderr)
        return 2
    if given.json:
        record: dict[str, Any] = {"device": device, "machine": machine_record(), "commit": commit()}
        print(json_text(record | {"lengths": results, "overhead_seconds": overheads}))
        return 0
    print(f"{device}, commit {commit()}\n")
    header = list(results[0])
    print(render("table", header, [[_cell(row[name]) for name in header] for row in results]))
    for length, seconds in overheads.items():
        print(f"the host's part of {PROPOSED} proposed tokens after a text of {length}: {seconds * 1e6:.0f} us")
    return 0


def _check_positions(draft: Engine) -> None:
    """Raise before anything is measured, if the texts of `_overhead` would not fit."""
    if draft.max_seq_len < MOST_POSITIONS:
        raise AtomFlowError(
            f"The draft model {draft.checkpoint.path} has {draft.max_seq_len} positions, and measuring what the host "
            f"adds takes {MOST_POSITIONS}; choose one with more."
        )


def _results(
    engine: Engine, draft: Engine, prompts: Sequence[Prompt], given: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for plain decoding, for each length, and for the engine's own choice: sums over the prompts."""
    ways: list[int | str] = [0, *given.lengths, ADAPTIVE]
    turns: dict[int | str, list[list[Decoded]]] = {way: [] for way in ways}
    for prompt in prompts:
        tokens = _encoded(engine, prompt)
        engine.generate_tokens(tokens, SamplingParams(max_tokens=1)).finish()  # from here on it is in the KV cache
        expected = _decode(engine, draft, tokens, 0, given.tokens).reply.token_ids
        if len(expected) < 2:
            raise AtomFlowError(f"The reply to {prompt.text!r} is one token long; leave that prompt out.")
        for rows in turns.values():
            rows.append([])
        for turn in range(given.repeats + 1):
            for way in ways:
                decoded = _decode(engine, draft, tokens, way, given.tokens)
                if decoded.reply.token_ids != expected:
                    raise AtomFlowError(f"A reply with {way} proposed tokens differs from the plain one.")
                if turn:  # not the first, in which the draft model takes the prompt in
                    turns[way][-1].append(decoded)
    seconds = {way: sum(median(one.seconds for one in row) for row in rows) for way, rows in turns.items()}
    return [_row(way, rows, seconds[way], seconds[0]) for way, rows in turns.items()]


def _encoded(engine: Engine, prompt: Prompt) -> list[int]:
    text = engine.text
    return text.encode_chat([{"role": "user", "content": prompt.text}]) if prompt.chat else text.encode(prompt.text)


def _decode(engine: Engine, draft: Engine, tokens: list[int], way: int | str, count: int) -> Decoded:
    drafter = FixedLength(draft, way) if isinstance(way, int) and way else None
    params = SamplingParams(max_tokens=count, speculate="draft" if way else "off")
    reply = engine.generate_tokens(tokens, params, drafter=drafter)
    next(reply)
    started = time.process_time()
    reply.finish()
    backend = engine.backend
    assert isinstance(backend, CpuBackend)
    return Decoded(reply, (time.process_time() - started) / backend.threads)


def _row(way: int | str, rows: list[list[Decoded]], seconds: float, plain: float) -> dict[str, Any]:
    stats = [one.reply.stats for row in rows for one in row]
    tokens, steps, proposed, accepted = (
        sum(getattr(one, name) for one in stats) for name in ("tokens", "steps", "proposed", "accepted")
    )
    decoded = sum(row[0].reply.stats.tokens - 1 for row in rows)
    return {
        "proposed per step": way,
        "ms per token": round(seconds / decoded * 1e3, 2),
        "speed": round(plain / seconds, 3),
        "tokens per step": round((tokens - len(stats)) / steps, 2),
        "accepted": round(accepted / proposed, 3) if proposed else None,
        "time of the draft": round(
            sum(one.drafting_seconds for one in stats) / sum(one.decode_seconds for one in stats), 3
        ),
    }


def _overhead(draft: Engine, length: int) -> float:
    """Seconds of a proposal after a text of so many tokens, without the steps of the model: the least of many."""
    text, backend = [1] * length, draft.backend
    draft.reset()
    draft.continue_greedily(text, 1)
    backend.verify_greedy = lambda tokens: [1]  # type: ignore[method-assign]
    try:
        times = []
        for _ in range(PROPOSALS):
            text.append(1)
            started = time.perf_counter()
            draft.continue_greedily(text, PROPOSED)
            times.append(time.perf_counter() - started)
    finally:
        del backend.verify_greedy
        draft.reset()
    return min(times)


def _cell(value: float | str | None) -> str:
    return "-" if value is None else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checks what is proposed")
    parser.add_argument("draft", help="proposes")
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="as of numba-atomflow bench")
    parser.add_argument("--lengths", type=list_of(int, "1,2,4"), default=[1, 2, 4, 7], help="proposed tokens per step")
    parser.add_argument("--tokens", type=int, default=128, help="of a reply, at most")
    parser.add_argument("-r", "--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print a record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
