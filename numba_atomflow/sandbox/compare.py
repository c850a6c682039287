"""The comparison: what paging and batching cost a decode step, beside a contiguous KV cache and a single sequence.

The static and the paged layout run in the same process, on the same cache, with the same kernels for everything else.
Static: each sequence has a contiguous part of the cache. Paged: the same number of positions, in KV blocks whose order
is random. The cache holds noise: times do not depend on it.

Breakdown of the time from one step to the next, at each batch size:
- indirection: the paged step on the device, minus the static one;
- page tables: the host's updates of block tables and slots;
- scheduling: planning the step and appending its tokens;
- host: everything else between two steps: the batch to the device, the launch, the tokens back.
The latter three are measured in `ServingEngine` itself while it decodes a full batch.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from numba_atomflow.memory.paged import BlockManager
from numba_atomflow.sandbox.engine import ServingEngine
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.runner import Runner
from numba_atomflow.sandbox.scheduler import Batch, Chunk
from numba_atomflow.utils.progress import Progress

ROUNDS = 3  # in which the three measurements alternate, so that drift of the machine affects all of them


@dataclass(frozen=True)
class AttentionRow:
    """Attention of one layer for one token; median seconds."""

    context: int
    block_size: int
    static_seconds: float
    paged_seconds: float


@dataclass(frozen=True)
class StepRow:
    """A decode step of `batch` sequences; median seconds.

    Attributes:
        static_seconds, paged_seconds: of the step on the device, arg-max included.
        table_seconds, schedule_seconds: of the host, per step.
        wall_seconds: from one step to the next in `ServingEngine`, everything included.
    """

    batch: int
    context: int
    block_size: int
    static_seconds: float
    paged_seconds: float
    table_seconds: float
    schedule_seconds: float
    wall_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all sequences together, in `ServingEngine`."""
        return self.batch / self.wall_seconds

    def shares(self) -> dict[str, float]:
        """Each part of the breakdown as a share of `wall_seconds`. Noise may make a small one negative."""
        indirection = self.paged_seconds - self.static_seconds
        accounted = self.paged_seconds + self.table_seconds + self.schedule_seconds
        return {
            "indirection": indirection / self.wall_seconds,
            "page tables": self.table_seconds / self.wall_seconds,
            "scheduling": self.schedule_seconds / self.wall_seconds,
            "host": (self.wall_seconds - accounted) / self.wall_seconds,
        }


@dataclass
class Comparison:
    """The measurements of one model on one device."""

    model: str
    device: str
    repeats: int
    attention: list[AttentionRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)

    def steps_by_kind(self) -> dict[tuple[int, int], list[StepRow]]:
        """Rows by (block size, context), ordered by batch size."""
        kinds: dict[tuple[int, int], list[StepRow]] = {}
        for row in sorted(self.steps, key=lambda row: (row.block_size, row.context, row.batch)):
            kinds.setdefault((row.block_size, row.context), []).append(row)
        return kinds

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        steps = [
            asdict(row) | {"tokens_per_second": row.tokens_per_second, "shares": row.shares()} for row in self.steps
        ]
        return asdict(self) | {"steps": steps}


@dataclass(frozen=True)
class Grid:
    """What to measure: attention at `contexts`, whole steps at `step_contexts`, for all block sizes of the runner.

    Attributes:
        batches: sequences per step.
        repeats: runs per median.
        server_steps: steps of `ServingEngine` per row; each one adds a token to every sequence.
    """

    contexts: Sequence[int]
    step_contexts: Sequence[int]
    batches: Sequence[int]
    repeats: int = 20
    server_steps: int = 16

    @property
    def longest(self) -> int:
        """The most positions of a sequence."""
        return max(*self.contexts, *(context + self.server_steps + 2 for context in self.step_contexts))


def compare(runner: Runner, model: str, grid: Grid, progress: Progress | None = None) -> Comparison:
    """Run all measurements. The runner's cache must hold the largest batch, with `grid.longest` positions each."""
    comparison = Comparison(model, runner.device, grid.repeats)
    sizes = runner.sizes.block_sizes
    total = len(sizes) * (len(grid.contexts) + len(grid.step_contexts) * len(grid.batches))

    def report(label: str) -> None:
        if progress:
            progress(label, len(comparison.attention) + len(comparison.steps), total)

    for block_size in sizes:
        runner.use_block_size(block_size)
        for context in grid.contexts:
            report(f"attention at context {context}, KV blocks of {block_size}")
            comparison.attention.append(_attention_row(runner, context, grid.repeats))
        for context in grid.step_contexts:
            for batch in grid.batches:
                report(f"{batch} sequences at context {context}, KV blocks of {block_size}")
                comparison.steps.append(_step_row(runner, batch, context, grid))
    report("done")
    return comparison


def _attention_row(runner: Runner, context: int, repeats: int) -> AttentionRow:
    step = scattered_step(runner, 1, context)
    static, paged = [], []
    for _ in range(ROUNDS):
        static.append(runner.time_attention(step.static, "static", repeats))
        paged.append(runner.time_attention(step.paged, "paged", repeats))
    return AttentionRow(context, runner.block_size, median(static), median(paged))


def _step_row(runner: Runner, batch: int, context: int, grid: Grid) -> StepRow:
    static, paged, served = [], [], []
    for _ in range(ROUNDS):
        step = scattered_step(runner, batch, context)
        static.append(runner.time_step(step.static, "static", grid.repeats))
        paged.append(runner.time_step(step.paged, "paged", grid.repeats))
        served.append(_serve(runner, batch, context, grid.server_steps))
    table, schedule, wall = (median(values) for values in zip(*served, strict=True))
    return StepRow(batch, context, runner.block_size, median(static), median(paged), table, schedule, wall)


@dataclass(frozen=True)
class ScatteredStep:
    """A decode step in both layouts: the same tokens and positions, different slots."""

    static: Batch
    paged: Batch


def scattered_step(runner: Runner, batch: int, context: int, seed: int = 0) -> ScatteredStep:
    """A decode step of `batch` sequences of `context` positions each, the new one included. Writes KV blocks in random
    order to the runner's block table.
    """
    size, blocks = runner.block_size, -(-context // runner.block_size)
    order = np.random.default_rng(seed).permutation(runner.sizes.slots // size)[: batch * blocks].reshape(batch, blocks)
    runner.block_table[:batch, :blocks] = order
    runner.block_table_changed(dict.fromkeys(range(batch), (0, blocks)))
    last = context - 1
    rows = np.arange(batch)
    slots = {
        "static": rows * runner.sizes.capacity + last,
        "paged": order[:, last // size].astype(np.int64) * size + last % size,
    }
    batches = {}
    for layout, layout_slots in slots.items():
        requests = [Request(row, [1], 1) for row in range(batch)]
        chunks = [Chunk(request, last, context, []) for request in requests]
        positions, tokens = np.full(batch, last), np.full(batch, 1, np.int32)
        batches[layout] = Batch(chunks, tokens, positions, positions, rows, layout_slots, list(range(batch)), [])
    return ScatteredStep(batches["static"], batches["paged"])


def _serve(runner: Runner, batch: int, context: int, steps: int) -> tuple[float, float, float]:
    """Median seconds per step of an engine that decodes `batch` sequences: block tables, scheduling, wall time."""
    rng = np.random.default_rng(batch)
    order = rng.permutation(runner.sizes.slots // runner.block_size).tolist()
    engine = ServingEngine(_SkipPrefill(runner, batch * context), block_order=order)
    for number in range(batch):
        prompt = rng.integers(0, 1000, context - 1).tolist()
        engine.submit(Request(number, prompt, steps + 1))
    engine.step()  # prefill of all prompts
    engine.steps.clear()
    times = [time.perf_counter()]
    while not engine.scheduler.idle and len(engine.steps) < steps - 1:
        engine.step()
        times.append(time.perf_counter())
    table = float(np.median([step.table_seconds for step in engine.steps]))
    schedule = float(np.median([step.schedule_seconds for step in engine.steps]))
    return table, schedule, float(np.median(np.diff(times)))


class _SkipPrefill:
    """A runner that accepts prompts of any length and does not compute them: decode times do not depend on the cache's
    content.
    """

    def __init__(self, runner: Runner, max_batched_tokens: int) -> None:
        self._runner = runner
        self.max_batched_tokens, self.prefill_chunk = max_batched_tokens, 0
        self.sizes, self.block_table, self.block_size = runner.sizes, runner.block_table, runner.block_size

    def block_table_changed(self, dirty: Mapping[int, tuple[int, int]]) -> None:
        self._runner.block_table_changed(dirty)

    def run(self, batch: Batch) -> list[int]:
        if any(not chunk.request.output for chunk in batch.chunks):
            return [1] * len(batch.logits_indices)
        return self._runner.run(batch)


def blocks_needed(grid: Grid, block_size: int) -> int:
    """KV blocks of this size that the largest batch takes at the longest context."""
    return max(grid.batches) * BlockManager(1, block_size).blocks_for(grid.longest)
