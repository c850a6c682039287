"""Tables of what the cost model predicts (expectations.py): those of docs/prompts.md."""

from numba_atomflow.model.presets import PRESETS
from numba_atomflow.utils.tables import Style, render
from prefill_bench.cases import MODELS, PROJECTIONS, Case
from prefill_bench.expectations import (
    GEMM_GROUP,
    attention_seconds,
    predicted_seconds,
    projection,
    target_seconds,
    ttft_seconds,
)

_STEPS = (16, 32, 64, 128, 512, 2048)
_PROMPTS = (16, 64, 128, 512, 2048, 4096, 8192, 32768)


def prediction_tables(style: Style) -> str:
    """A layer's kernels in one chunk, in us; and whole prompts, in ms."""
    layers, prompts = [], []
    for model in MODELS:
        geometry = PRESETS[model]
        for tokens in _STEPS:
            gemms = [projection(geometry, kind).seconds(tokens, GEMM_GROUP) for kind in PROJECTIONS]
            cells = [*gemms, sum(gemms), attention_seconds(geometry, tokens)]
            layers.append([model, str(tokens), *(f"{seconds * 1e6:.1f}" for seconds in cells)])
        for tokens in _PROMPTS:
            cases = [Case("ttft", model, path, tokens) for path in ("gemm", "fp8")]
            cells = []
            for case in cases:
                seconds, target = predicted_seconds(case), target_seconds(case)
                assert seconds is not None
                cells += [f"{seconds * 1e3:.2f}", f"{target * 1e3:g}" if target else ""]
            prompts.append([model, str(tokens), *cells, f"{tokens / ttft_seconds(geometry, tokens):.0f}"])
    first = render(style, ["model", "tokens", *PROJECTIONS, "all four", "attention"], layers)
    second = render(style, ["model", "prompt", "gemm ms", "target", "fp8 ms", "target", "gemm tok/s"], prompts)
    return f"A layer, first chunk, us per kernel\n\n{first}\nTime to first token, ms\n\n{second}"
