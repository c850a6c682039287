"""What speculation gains on a GPU: steps of several tokens against a step of one, and replies at scripted acceptance.

    python scripts/bench_speculation.py --geometry llama-3.2-3b
    python scripts/bench_speculation.py --geometry llama-3.1-8b --acceptance 0.8 --json
    python scripts/bench_speculation.py --temperature 0.8

The weights are random. Steps: median time of the kernel for each number of tokens, at several positions, and of a whole
step, with the logits copied to the host, with tokens that the kernel chooses, or with sampled ones. Replies: a drafter
proposes the true continuation, each token right with a probability, as many as the step takes; the replies must have
the same tokens with and without.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from number_lists import at_least, list_of

from numba_atomflow import AtomFlowError, Engine, SamplingParams
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.host.machine import commit, machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.sampling import Sampler
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

PROMPT_TOKENS = 32
_REPLIES = 20  # with each acceptance, of another seed each; figures are of all together
_PHASES = ["tokens", "op", "adds to the step", "waits for input", "for weights", "computes"]


class ScriptedDrafter:
    """Proposes the known continuation of a prompt, each token right with a given probability.

    Args:
        tokens: of the continuation. length: most tokens to propose. seed: of which ones are right.
    """

    def __init__(self, tokens: list[int], length: int, acceptance: float, vocabulary: int, seed: int) -> None:
        self._tokens, self._length, self._acceptance, self._vocabulary = tokens, length, acceptance, vocabulary
        self._random = np.random.default_rng(seed)

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """The continuation, with some tokens replaced by others."""
        start = len(token_ids) - PROMPT_TOKENS
        true = self._tokens[start : start + min(limit, self._length)]
        right = self._random.random(len(true)) < self._acceptance
        return [token if ok else (token + 1) % self._vocabulary for token, ok in zip(true, right, strict=True)]

    def observe(self, result: StepResult) -> None:
        """No effect: the length is fixed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables or JSON; the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if min(given.positions) < 0 or not all(0 <= rate <= 1 for rate in given.acceptance):
        parser.error("--positions are 0 or more, --acceptance 0 to 1")
    try:
        with Engine.random(PRESETS[given.geometry], "cuda", max(given.positions) + given.tokens + 64) as engine:
            backend = engine.backend
            if not isinstance(backend, CudaBackend) or backend.verification.width == 1:
                parser.error(f"no step takes several tokens here, because {backend.verification.reason}")
            cached = max(1, *given.positions)  # keys that were never written could be NaN
            engine.feed(np.random.default_rng(2).integers(0, engine.geometry.vocabulary, cached).tolist())
            steps = {position: _steps(backend, position, given.repeats) for position in given.positions}
            replies = _replies(engine, given)
            device = backend.device
            phases = {position: _phases(backend, position) for position in given.positions} if given.trace else {}
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    record: dict[str, Any] = {"geometry": given.geometry, "device": device, "steps": steps, "replies": replies}
    if given.trace:
        record["phases"] = phases
    if given.json:
        print(json_text(record | {"machine": machine_record(), "commit": commit()}))
        return 0
    print(f"{given.geometry}, random weights, {device}, commit {commit()}\n")
    widths = list(next(iter(steps.values()))["kernel"])
    print(
        "microseconds: the kernel (ratio to one token); a step with logits; with the most likely tokens; with sampled"
    )
    rows = [[str(position), *(_cell(times, width) for width in widths)] for position, times in steps.items()]
    print(render("table", ["position", *(f"{width} tokens" for width in widths)], rows))
    for position, phase_rows in phases.items():
        print(f"position {position}, us per op: mean over CTAs and layers; the kernels with timestamps")
        cells = [[str(width), kind, *(f"{time * 1e6:.1f}" for time in times)] for width, kind, *times in phase_rows]
        print(render("table", _PHASES, cells))
    print("replies")
    header = ["tokens per step", "acceptance", "tok/s", "ratio", "mean accepted length"]
    print(render("table", header, [[str(reply[name]) for name in header] for reply in replies]), end="")
    return 0


def _steps(backend: CudaBackend, position: int, repeats: int) -> dict[str, dict[int, float]]:
    """Seconds by the number of tokens: of the kernel, of a whole step with logits, of one whose tokens the kernel
    chooses, and of one whose tokens are sampled.
    """
    launch = backend.launch_verification
    assert launch is not None

    def sample(tokens: list[int]) -> list[int]:
        return launch(tokens, sampled=True)()

    backend.start(Sampler(SamplingParams(temperature=0.8, seed=1), backend.geometry.vocabulary, ()))
    backend.seek(position)
    kernel = backend.time_widths(repeats)
    logits = {width: _median_step(backend, position, width, backend.verify, repeats) for width in kernel}
    greedy = {width: _median_step(backend, position, width, backend.verify_greedy, repeats) for width in kernel}
    sampled = {width: _median_step(backend, position, width, sample, repeats) for width in kernel}
    return {"kernel": kernel, "logits": logits, "greedy": greedy, "sampled": sampled}


def _median_step(
    backend: CudaBackend, position: int, width: int, step: Callable[[list[int]], object], repeats: int
) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        backend.seek(position)
        step([1] * width)
        backend.seek(position + 1)
        times.append(time.perf_counter() - started)
    return median(times)


def _phases(backend: CudaBackend, position: int) -> list[tuple[Any, ...]]:
    """Where the time of the kernels' ops goes: rows of `_PHASES`."""
    backend.seek(position)
    rows = [(width, row) for width, trace in backend.trace_widths(5).items() for row in trace.phases()]
    return [
        (width, row.kind, row.seconds, row.staging_seconds, row.copy_wait_seconds, row.compute_seconds)
        for width, row in rows
    ]


def _replies(engine: Engine, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The speed of replies: plain, and with each number of tokens per step and acceptance."""
    vocabulary = engine.geometry.vocabulary
    params = SamplingParams(max_tokens=given.tokens, temperature=given.temperature, seed=1)
    prompt = np.random.default_rng(1).integers(0, vocabulary, PROMPT_TOKENS).tolist()
    engine.generate_tokens(prompt, params).finish()  # from here on, replies find the prompt in the cache
    expected = engine.generate_tokens(prompt, params).finish().token_ids
    plain = median(engine.generate_tokens(prompt, params).finish().stats.tokens_per_second for _ in range(3))
    results = [_result(1, 0.0, plain, plain, 1.0)]
    for width in (width for width in (4, 8) if width <= engine.backend.verification.width):
        for acceptance in given.acceptance:
            replies = []
            for seed in range(_REPLIES):
                drafter = ScriptedDrafter(expected, width - 1, acceptance, vocabulary, seed)
                reply = engine.generate_tokens(prompt, params, drafter=drafter).finish()
                if reply.token_ids != expected:
                    raise AtomFlowError(f"A reply with {width} tokens per step differs from the plain one.")
                replies.append(reply.stats)
            tokens, seconds = (sum(stats.tokens - 1 for stats in replies), sum(s.decode_seconds for s in replies))
            length = tokens / sum(stats.steps for stats in replies)
            results.append(_result(width, acceptance, tokens / seconds, plain, length))
    return results


def _result(width: int, acceptance: float, speed: float, plain: float, length: float) -> dict[str, Any]:
    return {
        "tokens per step": width,
        "acceptance": acceptance,
        "tok/s": round(speed),
        "ratio": round(speed / plain, 2),
        "mean accepted length": round(length, 2),
    }


def _cell(times: dict[str, dict[int, float]], width: int) -> str:
    steps = "; ".join(f"{times[name][width] * 1e6:.0f}" for name in ("logits", "greedy", "sampled"))
    return f"{times['kernel'][width] * 1e6:.0f} ({times['kernel'][width] / times['kernel'][1]:.2f}); {steps}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(PRESETS), default="llama-3.2-3b")
    parser.add_argument("--positions", type=list_of(int, "0,200,1000"), default=[0, 200, 1000, 4000])
    parser.add_argument("--acceptance", type=list_of(float, "0.6,0.8"), default=[0.6, 0.8, 0.9])
    parser.add_argument("--tokens", type=at_least(2), default=400, help="of a reply")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of replies; 0: greedy")
    parser.add_argument("-r", "--repeats", type=at_least(1), default=20)
    parser.add_argument("--trace", action="store_true", help="show where the time of the kernels goes, op by op")
    parser.add_argument("--json", action="store_true", help="print a record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
