"""Our engine with random weights: time to first token, whole requests, decode. All host work is included.

Prompts back to back run at the GPU's power limit: on an H200 at 1.4 to 1.7 GHz, where a prompt on an idle GPU has 1.9
GHz and more. So the time to first token is measured twice: after a pause, as a user's prompt comes, and back to back.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.model.presets import find_preset
from numba_atomflow.perf.bench import decode_turn
from prefill_bench.cases import BACK_TO_BACK, MAX_SEQ_LEN, REPLY, Case, Measured

_SECONDS = 3.0  # of the turns of a case, about
_TURNS = 3, 9  # least and most
_PAUSE = 0.15  # seconds before a prompt on an idle GPU


class EngineLab:
    """Keeps the engine of the last case while model and path stay the same."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._loaded: tuple[str, str] | None = None

    def measure(self, case: Case) -> Measured:
        """Measure a case of the parts ttft, requests and decode."""
        engine = self._load(case)
        prompt = np.random.default_rng(case.tokens).integers(0, engine.geometry.vocabulary, case.tokens).tolist()
        match case.part:
            case "ttft":
                first, *turns = self._turns(engine, prompt, 1)
                paused = self._turns(engine, prompt, 1, _PAUSE)[1:]
                notes = {"first": f"first turn {first[0] * 1e3:.0f} ms", "load": f"load {engine.load_seconds:.1f} s"}
                seconds = {"ttft": [turn[0] for turn in paused], BACK_TO_BACK: [turn[0] for turn in turns]}
                return Measured(seconds, notes=notes)
            case "requests":
                turns = self._turns(engine, prompt, REPLY + 1)[1:]
                seconds = {name: [turn[i] for turn in turns] for i, name in enumerate(("ttft", "tpot", "total"))}
                return Measured(seconds)
            case "decode":
                engine.reset()
                decode_turn(engine, prompt, REPLY)
                engine.rewind(len(prompt) - 1)
                path = getattr(engine.backend.decode_path, "name", "")
                return Measured({"tpot": decode_turn(engine, prompt, REPLY)}, notes={"path": path})
        raise ValueError(f"an engine has no part {case.part}")

    def _turns(
        self, engine: Engine, prompt: Sequence[int], tokens: int, pause: float = 0.0
    ) -> list[tuple[float, float, float]]:
        """Seconds to the first token, per token after it, and of everything. The first turn may compile and capture."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        turns: list[tuple[float, float, float]] = []
        repeats = 0
        while len(turns) <= repeats:
            engine.reset()
            time.sleep(pause)
            stats = engine.generate_tokens(prompt, params).finish().stats
            total = stats.ttft + (tokens - 1) * stats.tpot
            turns.append((stats.ttft, stats.tpot, total))
            repeats = min(_TURNS[1], max(_TURNS[0], int(_SECONDS / total)))
        return turns

    def _load(self, case: Case) -> Engine:
        wanted = case.model, case.subject
        if self._engine is None or self._loaded != wanted:
            self.close()
            path: Any = case.subject
            geometry = find_preset(case.model)
            self._engine = Engine.random(geometry, "cuda", MAX_SEQ_LEN, prefill=path, name=case.model)
            self._loaded = wanted
        return self._engine

    def close(self) -> None:
        """Release the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
