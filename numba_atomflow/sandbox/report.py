"""Metrics of a served workload: throughput, latency, cache usage, time per step."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from numba_atomflow.sandbox.engine import ServingEngine
from numba_atomflow.sandbox.requests import Request


@dataclass(frozen=True)
class Percentiles:
    """Percentiles, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Percentiles of at least one value."""
        return cls(*np.percentile(list(values), [50, 90, 99]).tolist())


@dataclass(frozen=True)
class ServingReport:
    """Metrics of one run. Seconds are those of the engine's clock. Fields are keys of the JSON report.

    Attributes:
        tokens: generated tokens.
        throughput: generated tokens per second, from the first arrival to the last token.
        latency: from arrival to the last token.
        block_copies: KV blocks copied on write.
        shared_tokens: tokens found in the cache (prefix hits, forks), those of recomputed requests included.
        mean_utilisation, peak_utilisation: share of KV blocks in use, over steps.
        mean_columns: mean tokens per step.
        schedule, table, model: seconds per step of the scheduler; of block tables and slots; of the model with the
            copies to and from the device.
    """

    requests: int
    prompt_tokens: int
    tokens: int
    seconds: float
    throughput: float
    ttft: Percentiles
    tpot: Percentiles | None
    latency: Percentiles
    preemptions: int
    block_copies: int
    shared_tokens: int
    blocks: int
    block_size: int
    mean_utilisation: float
    peak_utilisation: float
    steps: int
    mean_columns: float
    schedule: Percentiles
    table: Percentiles
    model: Percentiles

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record."""
        return asdict(self)


def report_of(engine: ServingEngine, requests: Sequence[Request]) -> ServingReport:
    """The metrics of an engine that has finished these requests."""
    steps, blocks = engine.steps, engine.manager.block_count
    used = np.array([step.used_blocks for step in steps]) / blocks
    tokens = sum(len(request.output) for request in requests)
    seconds = engine.now - min(request.arrival for request in requests)
    tpots = [request.tpot for request in requests if request.tpot is not None]
    return ServingReport(
        requests=len(requests),
        prompt_tokens=sum(len(request.prompt) for request in requests),
        tokens=tokens,
        seconds=seconds,
        throughput=tokens / seconds,
        ttft=Percentiles.of(request.ttft for request in requests),
        tpot=Percentiles.of(tpots) if tpots else None,
        latency=Percentiles.of(request.token_times[-1] - request.arrival for request in requests),
        preemptions=sum(request.preemptions for request in requests),
        block_copies=engine.manager.copies,
        shared_tokens=sum(request.shared_tokens for request in requests),
        blocks=blocks,
        block_size=engine.manager.block_size,
        mean_utilisation=float(used.mean()),
        peak_utilisation=float(used.max()),
        steps=len(steps),
        mean_columns=float(np.mean([step.batched_tokens for step in steps])),
        schedule=Percentiles.of(step.schedule_seconds for step in steps),
        table=Percentiles.of(step.table_seconds for step in steps),
        model=Percentiles.of(step.model_seconds for step in steps),
    )
