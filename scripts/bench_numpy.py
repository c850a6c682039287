"""Decode speed on the CPU against a plain NumPy float32 forward pass of the same model, in the same run.

Both sides have the same weights (FP8 here, dequantized to float32 for NumPy) and the same prompt, and generate the same
greedy tokens; their turns are interleaved, so that other load on the machine affects both alike. Two achievable limits
are measured as well: memory bandwidth (a parallel sum over 1 GB) for decode, and BLAS throughput (a large product) for
prefill.

    python scripts/bench_numpy.py                      # the demo model
    python scripts/bench_numpy.py model.safetensors --json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from number_lists import at_least
from numpy.typing import NDArray

from numba_atomflow import AtomFlowError, Engine, SamplingParams, __version__
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.errors import OptionError
from numba_atomflow.geometry import rope_inverse_frequencies
from numba_atomflow.host.machine import commit, cpu_name
from numba_atomflow.ops.bandwidth import read_bandwidth
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.utils.json_text import json_text

PROMPT = "The history of computing began long before the first electronic machines, with"


class NumpyModel:
    """A Llama forward pass for one token at a time in plain NumPy, with weights in float32."""

    def __init__(self, engine: Engine) -> None:
        self.g = engine.geometry
        self.arrays = {}
        for name in engine.checkpoint.names():
            array = engine.checkpoint.array(name)
            if name.endswith(".weight"):
                self.arrays[name] = dequantize_groups(array, engine.checkpoint.array(name[:-7] + ".scale"))
            elif array.dtype == np.float32 and not name.endswith(".scale"):
                self.arrays[name] = np.array(array)
        self.cache = np.zeros((self.g.layers, 2, engine.max_seq_len, self.g.kv_heads, self.g.head_dim), np.float32)
        self.frequencies = rope_inverse_frequencies(self.g)
        self.position = 0

    def nbytes(self) -> int:
        """Bytes of weights that one token reads."""
        untied = 0 if self.g.tied_embeddings else self.arrays["embedding.weight"].nbytes
        return sum(array.nbytes for array in self.arrays.values()) - untied

    def step(self, token: int) -> NDArray[np.float32]:
        """Logits after one more token."""
        w, g = self.arrays, self.g
        angles = self.position * self.frequencies
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        x = w["embedding.weight"][token].copy()
        for i in range(g.layers):
            qkv = w[f"layer.{i}.qkv.weight"] @ self._norm(x, w[f"layer.{i}.attention_norm"])
            q, k, v = np.split(qkv, [g.q_dim, g.q_dim + g.kv_dim])
            keys, values = self.cache[i]
            keys[self.position] = self._rotate(k.reshape(g.kv_heads, g.head_dim), cosines, sines)
            values[self.position] = v.reshape(g.kv_heads, g.head_dim)
            q = self._rotate(q.reshape(g.heads, g.head_dim), cosines, sines)
            q = q.reshape(g.kv_heads, g.gqa_ratio, g.head_dim) / np.float32(np.sqrt(g.head_dim))
            length = self.position + 1
            scores = q @ keys[:length].transpose(1, 2, 0)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            attn_out = weights @ values[:length].transpose(1, 0, 2)
            x += w[f"layer.{i}.o.weight"] @ attn_out.reshape(-1)
            gate_up = w[f"layer.{i}.gate_up.weight"] @ self._norm(x, w[f"layer.{i}.ffn_norm"])
            gate, up = gate_up[: g.ffn], gate_up[g.ffn :]
            x += w[f"layer.{i}.down.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        self.position += 1
        lm_head = w["embedding.weight"] if g.tied_embeddings else w["vocabulary.weight"]
        logits: NDArray[np.float32] = lm_head @ self._norm(x, w["final_norm"])
        return logits

    def _norm(self, x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
        x_norm: NDArray[np.float32] = x / np.sqrt(np.mean(x * x) + np.float32(self.g.norm_eps)) * weight
        return x_norm

    @staticmethod
    def _rotate(
        heads: NDArray[np.float32], cosines: NDArray[np.float32], sines: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        low, high = np.split(heads, 2, axis=1)
        return np.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=1)


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def blas_throughput() -> float:
    """GFLOP/s of a 2048 x 2048 x 2048 float32 product: best of 5."""
    a = np.ones((2048, 2048), np.float32)
    a @ a
    return float(2 * 2048**3 / min(timed(lambda: a @ a) for _ in range(5)) / 1e9)


def decode_turn(engine: Engine, baseline: NumpyModel, prompt: list[int], tokens: int) -> tuple[float, float]:
    """One interleaved turn: seconds per token of ours and of NumPy's. Both must choose the same tokens."""
    params = SamplingParams(max_tokens=tokens + 1, ignore_eos=True, speculate="off")
    engine.reset()
    generation = engine.generate(prompt, params).finish()
    baseline.position = 0
    for token in prompt:
        logits = baseline.step(token)
    started = time.perf_counter()
    for ours in generation.token_ids[:-1]:
        if int(np.argmax(logits)) != ours:
            raise SystemExit("bench_numpy: the two sides generated different tokens; one of them is wrong")
        logits = baseline.step(ours)
    return generation.stats.tpot, (time.perf_counter() - started) / tokens


def prefill_turn(engine: Engine, tokens: int) -> float:
    """Seconds per token of a prompt of that many tokens."""
    ids = np.random.default_rng(0).integers(0, engine.geometry.vocabulary, tokens).tolist()
    engine.reset()
    return timed(lambda: engine.feed(ids)) / tokens


def measure(model: str, tokens: int, prompt_tokens: int, repeats: int) -> dict[str, Any]:
    """A JSON-ready record; times in milliseconds per token, medians over the repeats with their range."""
    with Engine.load(model) as engine:
        baseline = NumpyModel(engine)
        prompt = engine.text.encode(PROMPT)
        if len(prompt) + tokens > engine.max_seq_len:
            raise OptionError(
                f"--tokens is {tokens}; the context holds {engine.max_seq_len - len(prompt)} beside the prompt."
            )
        decode_turn(engine, baseline, prompt, 2)  # warm up
        prefill_turn(engine, prompt_tokens)
        turns, prefills, bandwidths, products = [], [], [], []
        for _ in range(repeats):
            turns.append(decode_turn(engine, baseline, prompt, tokens))
            prefills.append(prefill_turn(engine, prompt_tokens))
            bandwidths.append(read_bandwidth())
            products.append(blas_throughput())
        ours, theirs = ([turn[side] * 1e3 for turn in turns] for side in (0, 1))
        prefill = [seconds * 1e3 for seconds in prefills]
        g = engine.geometry
        per_layer = g.hidden * (2 * g.q_dim + 2 * g.kv_dim) + 3 * g.hidden * g.ffn
        flops = 2 * g.layers * per_layer  # of the projections, per prompt token
        return {
            "model": str(model),
            "cpu": cpu_name(),
            "threads": numba.config.NUMBA_NUM_THREADS,
            "versions": {"numba-atomflow": __version__, "numba": numba.__version__, "numpy": np.__version__},
            "commit": commit(),
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "repeats": repeats,
            "ours_ms": spread(ours),
            "numpy_ms": spread(theirs),
            "ratio": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
            "prefill_ms": spread(prefill),
            "prefill_ratio": spread([a / b for a, b in zip(ours, prefill, strict=True)]),
            "weights_gb_s": engine.weight_bytes_per_token / statistics.median(ours) / 1e6,
            "numpy_gb_s": baseline.nbytes() / statistics.median(theirs) / 1e6,
            "bandwidth_gb_s": max(bandwidths),
            "prefill_gflops": flops / statistics.median(prefill) / 1e6,
            "blas_gflops": max(products),
        }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(r: dict[str, Any]) -> str:
    """The record as a table."""

    def row(what: str, times: dict[str, float], share: str) -> str:
        middle, low, high = times["median"], times["min"], times["max"]
        return f"{what:34} {middle:8.2f} ms ({low:.2f}-{high:.2f})  {1e3 / middle:8.1f} tok/s  {share}"

    decode_share = f"{r['weights_gb_s']:.1f} GB/s, {r['weights_gb_s'] / r['bandwidth_gb_s']:.0%} of achievable"
    prefill_share = f"{r['prefill_gflops']:.0f} GFLOP/s, {r['prefill_gflops'] / r['blas_gflops']:.0%} of achievable"
    return "\n".join(
        [
            f"{r['model']} on {r['cpu']}, {r['threads']} threads, commit {r['commit']}, {r['repeats']} repeats",
            f"achievable in this run: memory {r['bandwidth_gb_s']:.1f} GB/s, BLAS {r['blas_gflops']:.0f} GFLOP/s",
            row("decode, NumPy float32", r["numpy_ms"], f"{r['numpy_gb_s']:.1f} GB/s"),
            row("decode, this project", r["ours_ms"], decode_share),
            row(f"prefill of {r['prompt_tokens']}, this project", r["prefill_ms"], prefill_share),
            f"decode against NumPy: {r['ratio']['median']:.2f}x ({r['ratio']['min']:.2f}-{r['ratio']['max']:.2f})",
            (
                f"prefill against decode: {r['prefill_ratio']['median']:.2f}x per token "
                f"({r['prefill_ratio']['min']:.2f}-{r['prefill_ratio']['max']:.2f})"
            ),
        ]
    )


def main() -> int:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="checkpoint, or the name of one")
    parser.add_argument("-n", "--tokens", type=at_least(1), default=64, help="tokens to decode (default: 64)")
    parser.add_argument(
        "-p", "--prompt-tokens", type=at_least(1), default=512, help="prompt length to time (default: 512)"
    )
    parser.add_argument("-r", "--repeats", type=at_least(1), default=5, help="interleaved turns (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        result = measure(options.model, options.tokens, options.prompt_tokens, options.repeats)
    except AtomFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json_text(result) if options.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
