"""Attention of a prompt in chunks, as the engine computes it, against one call of torch's flash attention."""

from typing import Any

import numpy as np
import torch

from numba_atomflow.model.presets import find_preset
from prefill_bench.attention_plans import attention_kernel, attention_plan, other_plans
from prefill_bench.cases import Case, Measured
from prefill_bench.expectations import CHUNK
from prefill_bench.torch_gpu import Run, relative_error, unpack_tiles

OURS, FLASH, CUDNN = "ours", "flash", "cuDNN"
_CHECKED_TOKENS = 32


class AttentionLab:
    """Measures attention."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu

    def measure(self, case: Case) -> Measured:
        """Seconds of a whole prompt, and the error of some tokens of each chunk."""
        gpu, g, tokens = self._gpu, find_preset(case.model), case.tokens
        chunk = min(CHUNK, tokens)
        plan = attention_plan(g, gpu.chip)
        plans = {OURS: plan} | (other_plans(plan) if case.variants else {})
        kernels = {name: attention_kernel(each, gpu.chip) for name, each in plans.items()}
        gpu.load(*kernels.values())
        q, keys, values = (
            torch.randn(tokens, width, device=gpu.device).half() for width in (g.q_dim, g.kv_dim, g.kv_dim)
        )
        starts = range(0, tokens, chunk)
        outs = [torch.full((plan.out.words,), -1, dtype=torch.int32, device=gpu.device) for _ in starts]
        count = torch.tensor([chunk], dtype=torch.int64, device=gpu.device)
        sides: dict[str, tuple[Run, int]] = {}
        errors: dict[str, float] = {}
        for name, each in plans.items():
            launches, found = [], []
            partials = torch.empty(each.partials, device=gpu.device)
            counters = torch.zeros(each.counters, dtype=torch.int32, device=gpu.device)
            for start, out in zip(starts, outs, strict=True):
                position = torch.tensor([start], dtype=torch.int64, device=gpu.device)
                shared = {"keys": keys, "values": values, "position": position, "count": count, "out": out}
                shared |= {"q": q[start : start + chunk], "partials": partials, "counters": counters}
                launches.append(gpu.launch(kernels[name], shared, each.ctas(chunk)))
                out.fill_(-1)
                gpu.run(launches[-1])
                picked = sorted({0, chunk - 1, *torch.randperm(chunk)[:_CHECKED_TOKENS].tolist()})
                expected = attend(q, keys, values, g.head_dim, [start + token for token in picked])
                found.append(relative_error(unpack_tiles(plan.out, out, picked), expected))
            errors[name] = float(np.max(found))  # NaN if one is

            def run_all(_: int, launches: list[Any] = launches) -> None:
                for launch in launches:
                    launch.run()

            sides[name] = run_all, 1
        for name, run in rivals(q, keys, values, g.head_dim).items():
            sides[name] = run, 1
        flop = 4.0 * g.heads * g.head_dim * tokens * (tokens + 1) / 2
        notes = {"plan": f"{plan.instructions}, {plan.query_tile} queries, {plan.key_block} keys, {len(starts)} chunks"}
        return Measured(gpu.alternate(sides), flop, errors, notes=notes)


def rivals(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, head_dim: int) -> dict[str, Any]:
    """torch's causal attention, by backend; only those that can run here.

    A backend that cannot share KV heads (GQA) gets keys and values that are copied for every head beforehand.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = [x.view(1, x.shape[0], -1, head_dim).transpose(1, 2) for x in (q, keys, values)]
    ratio = heads[0].shape[1] // heads[1].shape[1]
    copied = [heads[0], *(x.repeat_interleave(ratio, dim=1) for x in heads[1:])]
    found: dict[str, Any] = {}
    for name, backend in ((FLASH, SDPBackend.FLASH_ATTENTION), (CUDNN, SDPBackend.CUDNN_ATTENTION)):
        for operands, gqa in ((heads, True), (copied, False)):

            def run(_: int, backend: Any = backend, operands: Any = operands, gqa: bool = gqa) -> None:
                with sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=True, enable_gqa=gqa)

            if name not in found and _runs(run):
                found[name] = run
    return found


def _runs(run: Any) -> bool:
    """Whether this backend takes these operands. An error of the GPU itself is raised."""
    try:
        run(0)
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        return False
    return True


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, head_dim: int, tokens: list[int]) -> torch.Tensor:
    """Causal attention of some tokens in float64: [len(tokens), heads * head_dim]."""
    visible = max(tokens) + 1
    k, v = (x[:visible].double().view(visible, -1, head_dim) for x in (keys, values))
    rows = q[tokens].double().view(len(tokens), k.shape[1], -1, head_dim)  # heads that share a KV head are neighbours
    scores = torch.einsum("tkgd,skd->tkgs", rows, k) / head_dim**0.5
    ahead = torch.arange(visible, device=q.device)[None, :] > torch.tensor(tokens, device=q.device)[:, None]
    weights = scores.masked_fill(ahead[:, None, None, :], -torch.inf).softmax(-1)
    return torch.einsum("tkgs,skd->tkgd", weights, v).reshape(len(tokens), -1)
