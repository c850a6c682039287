"""The kernels that are compiled for every architecture: those of Llama 3.2 3B, and those that other models need."""

from dataclasses import dataclass, replace

from tiny_models import tiny_geometry

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.ops.cuda.runtime import bandwidth
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec
from numba_atomflow.sandbox.gpu_kernels import SandboxKernels
from numba_atomflow.sandbox.runner import CacheSizes

SMS = 132  # of an H200
SHARED_BYTES = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448, (12, 0): 101376}  # per CTA: it limits the GEMV width
TMA = (9, 0)  # the first with bulk copies

LLAMA = PRESETS["llama-3.2-3b"]
# Heads of 80, no GQA, Qwen's norms and bias, a float16 LM head: they take the other kernels.
OTHER = replace(LLAMA, heads=32, kv_heads=32, head_dim=80, qkv_bias=True, qk_norm=True)
PERSISTENT_MODELS = {
    "SmolLM2": tiny_geometry(layers=1, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152),
    "Llama 1B": tiny_geometry(layers=1, hidden=2048, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocabulary=4096),
    # Qwen2.5 0.5B, with the head norms of Qwen3: attention finishes q, k and v.
    "Qwen": tiny_geometry(
        layers=1,
        hidden=896,
        heads=14,
        kv_heads=2,
        head_dim=64,
        ffn=4864,
        vocabulary=4096,
        qkv_bias=True,
        qk_norm=True,
    ),
}
# Gemma 2 2B: heads of 256, GELU, soft caps, a sliding window, norms of what is added.
GEMMA = replace(
    LLAMA,
    hidden=2304,
    heads=8,
    kv_heads=4,
    head_dim=256,
    ffn=9216,
    hidden_act="gelu_tanh",
    post_norm=True,
    attention_soft_cap=50.0,
    logit_soft_cap=30.0,
    sliding_window=4096,
    sliding_layers=(0,),
)
# OLMo 2: no norms before projections, and one of all heads of q and of k.
OLMO = replace(LLAMA, pre_norm=False, post_norm=True, qk_norm=True, qk_norm_of_all_heads=True)
_OF_GEMMA = ("attention_x{}", "window_attention_x1", "gate_up_x1", "o_x1", "add_norm_x1", "cap_logits")
_OF_OLMO = ("qkv_x{}", "rope_x1")
_OF_OTHER = ("attention_x1", "rope_x{}", "embed_x1", "lm_head_x1", "lm_head_x{}", "prepack_fp16")
CACHE = CacheSizes(slots=1 << 16, block_sizes=(8, 32), sequences=8, longest=8192)  # of the sandbox
_OF_SANDBOX = (
    "attention_paged8_x{}",
    "attention_paged32_x{}",
    "attention_static_x{}",
    "qkv_x{}",
    "gate_up_x{}",
    "down_x{}",
)
_FP8_KINDS = ("qkv", "o", "gate_up", "down", "lm_head", "embed", "prepack")


@dataclass(frozen=True)
class Entry:
    """A kernel to compile."""

    name: str
    spec: KernelSpec

    @property
    def kind(self) -> str:
        return self.spec.name.rpartition("_x")[0] or self.spec.name

    @property
    def converts(self) -> bool:
        """Whether it converts FP8."""
        return self.kind in _FP8_KINDS and "fp16" not in self.name

    @property
    def weights(self) -> bool:
        """Whether it streams weights through tensor cores."""
        return self.spec.factory.__module__.endswith("gemv.kernels")

    @property
    def doubles(self) -> bool:
        """Whether it may use float64."""
        return self.spec.name in ("sample", "sample_rows")


def catalogue(capability: tuple[int, int]) -> list[Entry]:
    """All kernels of an architecture."""
    chip = Chip(SMS, SHARED_BYTES[capability], capability)
    wide = ModelKernels(LLAMA, chip).gemv_width
    entries = [Entry(name, kernel.spec) for name, kernel in ModelKernels(LLAMA, chip).planned.items()]
    other = ModelKernels(OTHER, chip, "fp16").planned
    names = [name.format(wide) for name in _OF_OTHER]
    entries += [Entry(f"{name} with an fp16 head, heads of 80", other[name].spec) for name in names]
    gemma, olmo = ModelKernels(GEMMA, chip, window=4096), ModelKernels(OLMO, chip)
    for model, kernels, kinds in (("Gemma 2", gemma, _OF_GEMMA), ("OLMo 2", olmo, _OF_OLMO)):
        names = [name.format(kernels.gemv_width) for name in kinds]
        entries += [Entry(f"{name} of {model}", kernels.planned[name].spec) for name in names]
    sandbox = SandboxKernels(LLAMA, chip, CACHE)
    names = [name.format(sandbox.widths[-1]) for name in _OF_SANDBOX]
    entries += [Entry(f"{name} of the sandbox", sandbox.planned[name].spec) for name in names]
    entries += [Entry(f"{kernel.spec.name} of the sandbox", kernel.spec) for kernel in sandbox.chunk_kernels(8)]
    sandbox = SandboxKernels(OTHER, chip, CACHE)
    entries.append(Entry("attention_paged8_x1, heads of 80", sandbox.planned["attention_paged8_x1"].spec))
    entries.append(Entry("read", bandwidth.read_kernel(SMS).spec))
    if capability >= TMA:
        entries.append(Entry("bulk_read", bandwidth.bulk_read_kernel(SMS).spec))
        planned = ModelKernels(LLAMA, chip, persistent=True).planned
        entries += [Entry(name, planned[name].spec) for name in ("argmax_rows", "sample_rows", "post_rows")]
    return entries


def persistent_catalogue(capability: tuple[int, int]) -> list[Entry]:
    """The persistent kernel and what goes with it, for one layer each: all layers run through the same code.

    It takes half a minute to compile and needs sm_90: so it is not in `catalogue`.
    """
    entries = []
    for model, geometry in PERSISTENT_MODELS.items():
        chip = Chip(SMS, SHARED_BYTES[capability], capability)
        kernels = ModelKernels(geometry, chip, persistent=True)
        entries.append(Entry(f"persistent of {model}'s layer", kernels.planned["persistent"].spec))
        entries.append(Entry(f"persistent of {model}'s layer, traced", kernels.persistent_traced.spec))
        entries.append(Entry(f"publish of {model}'s layer", kernels.planned["publish"].spec))
    return entries
