"""Whole requests by transformers: BF16, static cache, torch.compile (scripts/peers/hf_transformers.py).

Each case has a cache of its own size, as a user would give it, and compiles its decode step.
"""

import sys
from pathlib import Path

from prefill_bench.cases import REPLY, Case, Measured

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from protocol import Task

from numba_atomflow.model.presets import find_preset

_TURNS = 4


class PeerLab:
    """Keeps nothing from case to case."""

    def measure(self, case: Case) -> Measured:
        """Measure a case of the part requests."""
        import hf_transformers
        import torch

        torch.compiler.reset()
        task = Task(find_preset(case.model), case.tokens, REPLY, _TURNS)
        answer = hf_transformers.measure(task)
        totals = [ttft + REPLY * tpot for ttft, tpot in zip(answer.ttft, answer.tpot, strict=True)]
        return Measured({"ttft": answer.ttft, "tpot": answer.tpot, "total": totals}, notes={"what": answer.what})

    def close(self) -> None:
        """Nothing is kept."""
