"""Soak test: the same reply many times must be identical, bit for bit, and nothing may hang.

    python scripts/soak.py --steps 1000000                          # a tiny model, some minutes
    python scripts/soak.py --geometry llama-3.2-3b --steps 100000
    python scripts/soak.py --steps 200 --backend cpu --json
    python scripts/soak.py --steps 100000 --prefill gemm --prompt 700 --reply 20
    python scripts/soak.py --steps 100000 --speculate

A model with random weights answers the same prompt greedily, many times. Every pass must generate the tokens of the
first, and the same last logits, bit for bit: these depend on all that was computed before. Exit code 1 if not.

With --speculate, steps check 0 to 7 proposed tokens, as many as the backend can, some of them wrong; replies are greedy
without and with log-probabilities, and sampled with and without filters and penalty. Every reply must have the tokens,
and leave the keys and values, of one without speculation.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.machine import machine_record
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.model.step import SAMPLE, Attention
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.utils.json_text import json_text

TINY = ModelGeometry(
    layers=2, hidden=192, heads=4, kv_heads=2, head_dim=64, ffn=320, vocabulary=288, max_positions=1024
)
PROMPT = [1, 7, 3, 11, 5, 2, 13, 9]


def soak(engine: Engine, steps: int, prompt: list[int], reply_tokens: int) -> dict[str, object]:
    """Replies of `reply_tokens` until `steps` decode steps are done.

    Returns:
        A JSON-ready record: passes, steps, seconds, and the number of the first pass that differed, or None.
    """
    params = SamplingParams(max_tokens=reply_tokens, ignore_eos=True, speculate="off")
    expected, passes, done, differed = None, 0, 0, None
    started = time.perf_counter()
    while done < steps and differed is None:
        engine.reset()  # no prefix caching: a step of another width rounds differently
        reply = engine.generate_tokens(prompt, params).finish()
        logits = engine.backend.logits(0, 1)
        found = reply.token_ids, hashlib.sha256(logits.tobytes()).hexdigest()
        expected = expected or found
        if found != expected:
            differed = passes
        passes += 1
        done += reply_tokens - 1  # the first token comes from the prompt
    return {"passes": passes, "steps": done, "seconds": time.perf_counter() - started, "first_difference": differed}


class RandomProposals:
    """Proposes a random number of the tokens that follow, each wrong with a probability of 1 to 16.

    Args:
        tokens: of the whole reply. start: tokens of the prompt.
    """

    def __init__(self, tokens: Sequence[int], start: int, vocabulary: int, random: np.random.Generator) -> None:
        self._tokens, self._start, self._vocabulary, self._random = tokens, start, vocabulary, random

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """0 to `limit` tokens."""
        at, count = len(token_ids) - self._start, int(self._random.integers(limit + 1))
        wrong = self._random.integers(16, size=count) == 0
        others = self._random.integers(self._vocabulary, size=count)
        known = zip(self._tokens[at : at + count], wrong, others, strict=False)
        return [int(other) if is_wrong else token for token, is_wrong, other in known]

    def observe(self, result: StepResult) -> None:
        """No effect."""


def soak_speculation(engine: Engine, steps: int, prompt: list[int], reply_tokens: int) -> dict[str, object]:
    """Replies of `reply_tokens` with random proposals, beside those without, until `steps` decode steps are done.

    Returns:
        A JSON-ready record: as that of `soak`, and the tokens proposed and accepted.
    """
    ways = [
        SamplingParams(max_tokens=reply_tokens, ignore_eos=True, **way)
        for way in (
            {},
            {"logprobs": 0},
            {"temperature": 0.8, "seed": 1},
            {"temperature": 1.0, "seed": 2, "top_p": 0.9, "repetition_penalty": 1.2},
        )
    ]
    random, started = np.random.default_rng(0), time.perf_counter()
    expected = []
    for way in ways:
        engine.reset()
        plain = engine.generate_tokens(prompt, replace(way, speculate="off")).finish().token_ids
        expected.append((plain, _cache_digest(engine, len(prompt) + reply_tokens - 1)))
    passes, done, proposed, accepted, differed = 0, 0, 0, 0, None
    while done < steps and differed is None:
        way = passes % len(ways)
        engine.reset()
        drafter = RandomProposals(expected[way][0], len(prompt), engine.geometry.vocabulary, random)
        reply = engine.generate_tokens(prompt, ways[way], drafter=drafter).finish()
        found = reply.token_ids, _cache_digest(engine, len(prompt) + reply_tokens - 1)
        if found != expected[way]:
            differed = passes
        passes += 1
        done += reply.stats.steps
        proposed += reply.stats.proposed
        accepted += reply.stats.accepted
    seconds = time.perf_counter() - started
    counts = {"passes": passes, "steps": done, "proposed": proposed, "accepted": accepted}
    return counts | {"seconds": seconds, "first_difference": differed}


def _cache_digest(engine: Engine, positions: int) -> str:
    """SHA-256 of all keys and values of the first positions."""
    digest, backend = hashlib.sha256(), engine.backend
    attention = [op for op in backend.step(1, SAMPLE) if isinstance(op, Attention)]
    with backend.memory() as memory:
        for op in attention:
            for view in (op.keys, op.values):
                digest.update(memory.read(view.rows(0, positions)).tobytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(PRESETS), metavar="NAME", help="instead of a tiny model")
    parser.add_argument("--steps", type=int, default=100_000, help="decode steps in all")
    parser.add_argument("--prompt", type=int, default=len(PROMPT), metavar="N", help="tokens of the prompt")
    parser.add_argument("--reply", type=int, default=400, help="tokens of a reply")
    parser.add_argument("--backend", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--decode", default="auto", choices=["auto", "graph", "persistent"])
    parser.add_argument("--prefill", default="auto", choices=["auto", "gemv", "gemm", "fp8"])
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the model")
    parser.add_argument("--speculate", action="store_true", help="check proposed tokens, against replies without")
    parser.add_argument("--json", action="store_true", help="print a record")
    options = parser.parse_args()
    if options.steps < 1 or options.prompt < 1 or options.reply < 2:
        parser.error("--steps and --prompt must be 1 or more, and --reply 2 or more")
    geometry = PRESETS[options.geometry] if options.geometry else TINY
    length = options.prompt + options.reply
    try:
        how = {"decode": options.decode, "prefill": options.prefill, "gpus": options.gpus}
        with Engine.random(geometry, options.backend, length, **how) as engine:
            prompt = [PROMPT[i % len(PROMPT)] for i in range(options.prompt)]
            run = soak_speculation if options.speculate else soak
            record = run(engine, options.steps, prompt, options.reply)
            path = engine.backend.decode_path
            record |= {"device": engine.backend.device, "decode": None if path is None else path.name}
    except AtomFlowError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json_text(record | {"machine": machine_record()}))
    else:
        verdict = "identical" if record["first_difference"] is None else f"pass {record['first_difference']} DIFFERS"
        checked = f", {record['accepted']} of {record['proposed']} proposals right" if options.speculate else ""
        print(
            f"{record['device']}, decode {record['decode'] or 'step'}: {record['passes']} passes, "
            f"{record['steps']} steps in {record['seconds']:.1f} s{checked}: {verdict}"
        )
    return 1 if record["first_difference"] is not None else 0


if __name__ == "__main__":
    sys.exit(main())
