"""Quality loss of FP8 activations: the W8A8 math of `--prefill fp8`, emulated on the CPU.

The reference is the checkpoint itself: transformers with its dequantized FP8 weights, float32 activations. Each variant
rounds the inputs of some projections as the GPU kernels do (E4M3, one float32 scale for each token and group of 128
along K, scale = largest magnitude / 448) or in another way, for comparison; everything else stays float32: the KV
cache, attention, the LM head. Texts as in `quality.py`, in windows of 512 tokens, every position scored.

For each text and variant: perplexity and its increase over the reference's, mean and 99th percentile of the
Kullback-Leibler divergence of the next-token distribution in nats, and top-1, the share of positions whose most likely
token is the same.

    python scripts/fp8_activations.py                          # the demo model
    python scripts/fp8_activations.py my-model --json

`--sums` computes instead what the accumulator of Hopper's FP8 tensor cores would lose, as the literature describes it
(`accumulate`): products of normally distributed codes against exact sums, by the number of products that are summed
before the accumulator is added to float32 sums. The other figures do not include it.

Needs the extra `validate` (torch, transformers).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from number_lists import at_least
from numpy.typing import NDArray
from quality import read_texts

from numba_atomflow import AtomFlowError
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.ops.fp8 import GROUP, dequantize_groups, encode_groups, quantize_groups
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.validate.hugging_face import dequantized_model

Rows = NDArray[np.float32]

WINDOW = 512  # tokens
ALL = ("qkv", "o", "gate_up", "down")
MODULES = {  # transformers' names of the projections that share an input
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


# --- how activations are rounded ---------------------------------------------------------------------------------


def round_to_float16(x: Rows) -> Rows:
    """What the W8A16 kernels read."""
    return x.astype(np.float16).astype(np.float32)


def round_per_group(x: Rows) -> Rows:
    """E4M3 with a float32 scale per token and group of 128."""
    return dequantize_groups(*quantize_groups(x))


def round_with_powers_of_two(x: Rows) -> Rows:
    """The same with each scale rounded up to a power of two."""
    scales = np.exp2(np.ceil(np.log2(quantize_groups(x)[1])))
    return dequantize_groups(encode_groups(x, scales), scales)


def round_per_token(x: Rows) -> Rows:
    """E4M3 with one float32 scale per token."""
    scales = np.broadcast_to(quantize_groups(x)[1].max(axis=1, keepdims=True), (len(x), -(-x.shape[1] // GROUP)))
    scales = np.ascontiguousarray(scales)
    return dequantize_groups(encode_groups(x, scales), scales)


@dataclass(frozen=True)
class Variant:
    """Which inputs are rounded, and how."""

    inputs: tuple[str, ...]
    scale: str
    round: Callable[[Rows], Rows]

    @property
    def name(self) -> str:
        return "all" if self.inputs == ALL else ", ".join(self.inputs)


GROUPS = "group of 128"
VARIANTS = (
    Variant(ALL, "float16", round_to_float16),
    Variant(ALL, GROUPS, round_per_group),
    Variant(ALL, f"{GROUPS}, power of two", round_with_powers_of_two),
    Variant(ALL, "token", round_per_token),
    Variant(("qkv", "o", "gate_up"), GROUPS, round_per_group),
    Variant(("qkv", "gate_up"), GROUPS, round_per_group),
    *(Variant((part,), GROUPS, round_per_group) for part in ALL),
)


@contextmanager
def rounded_inputs(model: Any, variant: Variant) -> Iterator[None]:
    """The model's projections read rounded activations."""
    import torch

    names = {name for part in variant.inputs for name in MODULES[part]}

    def replace(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        rows = np.ascontiguousarray(x.numpy().reshape(-1, x.shape[-1]))
        return (torch.from_numpy(variant.round(rows)).reshape(x.shape),)

    hooks = [
        module.register_forward_pre_hook(replace)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- divergence --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """Of a variant from the reference, over all scored positions of a text.

    Attributes:
        increase: of perplexity, relative.
        mean_kl, kl_99: KL(reference || variant) in nats per token: mean and 99th percentile.
        top1: share of positions with the same most likely token.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    increase: float
    mean_kl: float
    kl_99: float
    top1: float


def log_probabilities(model: Any, window: Sequence[int]) -> Any:
    """Of every next token, float32 [T, V] (torch)."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([list(window)]), use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)


def compare(model: Any, windows: Sequence[list[int]], variants: Sequence[Variant], name: str) -> list[dict[str, Any]]:
    """One record per variant; the reference's log-probabilities of a window are computed once."""
    import torch

    kl: list[list[Any]] = [[] for _ in variants]
    totals = np.zeros((len(variants), 2))  # loss, positions with the same most likely token
    loss = 0.0
    for number, window in enumerate(windows):
        print(f"{name}: window {number + 1} of {len(windows)}", file=sys.stderr)
        reference = log_probabilities(model, window)[:-1]
        targets, rows = torch.tensor(window[1:]), torch.arange(len(window) - 1)
        loss -= float(reference[rows, targets].double().sum())
        for i, variant in enumerate(variants):
            with rounded_inputs(model, variant):
                other = log_probabilities(model, window)[:-1]
            kl[i].append((reference.exp() * (reference - other)).sum(dim=-1, dtype=torch.float64).numpy())
            totals[i, 0] -= float(other[rows, targets].double().sum())
            totals[i, 1] += int((reference.argmax(-1) == other.argmax(-1)).sum())
    scored = sum(len(window) - 1 for window in windows)
    records = []
    for i, variant in enumerate(variants):
        each = np.concatenate(kl[i])
        perplexity, expected = np.exp(totals[i, 0] / scored), np.exp(loss / scored)
        divergence = Divergence(
            scored, perplexity, expected, perplexity / expected - 1, each.mean(), np.quantile(each, 0.99),
            totals[i, 1] / scored,
        )  # fmt: skip
        values = {key: int(value) if key == "tokens" else float(value) for key, value in asdict(divergence).items()}
        records.append({"text": name, "inputs": variant.name, "scale": variant.scale} | values)
    return records


def report(records: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        "| text | rounded inputs | scale per | perplexity | increase | mean KL | 99 % of KL | top-1 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['text']} | {r['inputs']} | {r['scale']} | {r['perplexity']:.3f} | {r['increase']:+.2%} "
        f"| {r['mean_kl']:.2g} | {r['kl_99']:.2g} | {r['top1']:.1%} |"
        for r in records
    ]
    return "\n".join(lines)


# --- sums of the tensor cores ------------------------------------------------------------------------------------

FRACTION_BITS = 13  # of the accumulator within an FP8 instruction
INSTRUCTION_K = 32  # products that one instruction sums


def truncate(values: NDArray[np.float64], exponent: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rounded toward zero to multiples of 2^(exponent - 13)."""
    return np.ldexp(np.trunc(np.ldexp(values, FRACTION_BITS - exponent)), exponent - FRACTION_BITS)


def accumulate(w: NDArray[np.float64], x: NDArray[np.float64], promotion: int) -> NDArray[np.float64]:
    """X W^T [T, N] of E4M3 values [N, K] and [T, K], summed as Hopper's FP8 tensor cores do, as far as is known.

    An instruction aligns its 32 products and the accumulator to the largest exponent among them, keeps 13 bits of
    fraction, and truncates the sum likewise (DeepSeek-V3 Technical Report, 3.3.2; Khattak and Mikaitis, "Accurate
    Models of NVIDIA Tensor Cores", 2025). NVIDIA documents none of it. Every `promotion` of K, the accumulator is added
    to float32 sums and starts again from zero.
    """
    total = np.zeros((len(x), len(w)))
    for start in range(0, w.shape[1], promotion):
        accumulator = np.zeros_like(total)
        for k in range(start, min(start + promotion, w.shape[1]), INSTRUCTION_K):
            terms = x[:, None, k : k + INSTRUCTION_K] * w[None, :, k : k + INSTRUCTION_K]
            terms = np.concatenate([terms, accumulator[..., None]], axis=-1)
            exponent = np.frexp(np.abs(terms).max(axis=-1))[1].astype(np.int64) - 1
            summed = truncate(terms, exponent[..., None]).sum(axis=-1)
            accumulator = truncate(summed, np.frexp(summed)[1].astype(np.int64) - 1)
        total = (total + accumulator).astype(np.float32).astype(np.float64)
    return total


def compare_sums(tokens: int = 32, rows: int = 32) -> list[dict[str, Any]]:
    """Relative L2 error of X W^T by K and promotion."""
    rng, records = np.random.default_rng(17), []
    for in_features in (2048, 8192):
        operands = []
        for count in (rows, tokens):
            values = rng.standard_normal((count, in_features)).astype(np.float32)
            codes, scales = quantize_groups(values)
            operands.append(dequantize_groups(codes, np.ones_like(scales)).astype(np.float64))
        w, x = operands
        exact = x @ w.T
        for promotion in (GROUP, 512, 2048, 8192):
            if promotion <= in_features:
                error = float(np.linalg.norm(accumulate(w, x, promotion) - exact) / np.linalg.norm(exact))
                records.append({"in_features": in_features, "promotion": promotion, "error": error})
    return records


def report_sums(records: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| K | products before promotion | relative L2 error of the sums |", "| ---: | ---: | ---: |"]
    lines += [f"| {r['in_features']} | {r['promotion']} | {r['error']:.2g} |" for r in records]
    return "\n".join(lines)


def main() -> int:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a checkpoint, or the name of one")
    parser.add_argument("--windows", type=at_least(1), default=7, help="of each text, at most (default: 7)")
    parser.add_argument("--sums", action="store_true", help="the tensor cores' sums instead, by a model of them")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args()
    if options.sums:
        records = compare_sums()
        print(json_text(records) if options.json else report_sums(records))
        return 0
    records = []
    try:
        with Checkpoint.open(find_checkpoint(options.model)) as checkpoint:
            model, codec = dequantized_model(checkpoint), TextCodec(checkpoint.text)
            width = min(WINDOW, checkpoint.geometry.max_positions)
        prefix = codec.encode("")[:1]
        for name, text in read_texts().items():
            tokens = codec.encode(text, add_special=False)
            step = width - len(prefix)
            starts = range(0, len(tokens) - step + 1, step)[: options.windows]
            records += compare(model, [[*prefix, *tokens[s : s + step]] for s in starts], VARIANTS, name)
    except AtomFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json_text(records) if options.json else report(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
