"""The kernels that are compiled for every architecture: those of Llama 3.2 3B, and those that other models need."""

from dataclasses import dataclass, replace

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.ops.cuda import ceiling
from numba_atomflow.ops.cuda.chip import Chip
from numba_atomflow.ops.cuda.spec import U32, KernelSpec, kernel_spec
from numba_atomflow.presets import PRESETS
from numba_atomflow.sandbox.gpu_kernels import SandboxKernels
from numba_atomflow.sandbox.runner import CacheSizes

MULTIPROCESSORS, SHARED_BYTES = 132, 232448  # of an H200
COPY_ENGINE = (9, 0)  # the first with one
ABILITIES = ((8, 0), (8, 9), (9, 0))  # the first; with conversion of FP8; with programmatic dependent launch

LLAMA = PRESETS["llama-3.2-3b"]
# Heads of 80, no GQA, Qwen's norms and bias, a float16 head: what the other kernels are for.
OTHER = replace(LLAMA, heads=32, kv_heads=32, head_dim=80, qkv_bias=True, qk_norm=True)
_OF_OTHER = ("attention_x1", "rope_x8", "embed_x1", "vocabulary_x1", "vocabulary_x8", "repack_halves")
CACHE = CacheSizes(slots=1 << 16, block_sizes=(8, 32), sequences=8, longest=8192)  # of the sandbox
_OF_SANDBOX = ("attention_paged8_x8", "attention_paged32_x8", "attention_static_x8", "qkv_x8")
_HARDWARE_FP8 = ("qkv", "o", "gate_up", "down", "vocabulary", "embed", "repack")


@dataclass(frozen=True)
class Entry:
    """A kernel to compile.

    Attributes:
        first: the first architecture that has what it uses.
    """

    name: str
    spec: KernelSpec
    first: tuple[int, int] = (8, 0)

    @property
    def kind(self) -> str:
        return self.spec.name.rpartition("_x")[0] or self.spec.name

    @property
    def decodes(self) -> bool:
        """Whether it decodes FP8."""
        return self.kind in _HARDWARE_FP8 and "halves" not in self.name

    @property
    def weights(self) -> bool:
        """Whether it streams weights through tensor cores."""
        return self.spec.factory.startswith("projection_kernels")

    @property
    def doubles(self) -> bool:
        """Whether it may use float64."""
        return self.spec.name == "sample"


def catalogue(capability: tuple[int, int]) -> list[Entry]:
    """All kernels, as they are for this architecture or an older one with the same abilities."""
    chip = Chip(MULTIPROCESSORS, SHARED_BYTES, max(cc for cc in ABILITIES if cc <= capability))
    entries = [Entry(name, kernel.spec) for name, kernel in ModelKernels(LLAMA, chip).planned.items()]
    other = ModelKernels(OTHER, chip, "fp16").planned
    entries += [Entry(f"{name} of halves, heads of 80", other[name].spec) for name in _OF_OTHER]
    sandbox = SandboxKernels(LLAMA, chip, CACHE, halves=False).planned
    entries += [Entry(f"{name} of the sandbox", sandbox[name].spec) for name in _OF_SANDBOX]
    sandbox = SandboxKernels(OTHER, chip, CACHE, halves=False).planned
    entries.append(Entry("attention_paged8_x1, heads of 80", sandbox["attention_paged8_x1"].spec))
    shared = ceiling.bulk_shared_bytes()
    entries += [
        Entry("read", kernel_spec("read", "ceiling:make_read", (U32, U32), ceiling.THREADS)),
        Entry("bulk_read", kernel_spec("bulk_read", "ceiling:make_bulk_read", (U32, U32), 32, shared), COPY_ENGINE),
    ]
    return entries
