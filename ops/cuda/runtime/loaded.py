"""A model's kernels on the device: each is compiled, or read from the cache, and loaded when a step first needs it."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

from numba_atomflow.device.resources import Resources
from numba_atomflow.ops.cuda.runtime.build import build
from numba_atomflow.ops.cuda.runtime.launch import Kernel
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec, Planned
from numba_atomflow.utils.progress import OpenBar, Progress


class LoadedKernels(Mapping[str, Kernel]):
    """Kernels by name; the GPU's context must be current.

    Args:
        planned: kernels that are loaded when they are looked up. Others must be required first.
        capability: of the GPU.
        resources: owns the kernels.

    Attributes:
        seconds: spent on compiling kernels and on reading them from the cache.
        open_bar: opens a progress bar for kernels that are compiled without one of the caller's.
    """

    def __init__(self, planned: Mapping[str, Planned], capability: tuple[int, int], resources: Resources) -> None:
        self._planned, self._capability, self._resources = planned, capability, resources
        self._loaded: dict[str, Kernel] = {}
        self.seconds = 0.0
        self.open_bar: OpenBar = nullcontext

    def require(self, specs: Iterable[KernelSpec], progress: Progress | None = None) -> None:
        """Load these kernels, unless they are loaded; those that must be compiled are compiled in parallel.

        Raises:
            BackendError: the compiler is not installed, or failed.
            ValueError: another kernel of the same name is loaded.
        """
        specs = list(dict.fromkeys(specs))
        for spec in specs:
            if spec.name in self._loaded and self._loaded[spec.name].spec != spec:
                raise ValueError(f"two kernels are called {spec.name}")
        missing = [spec for spec in specs if spec.name not in self._loaded]
        if not missing:
            return
        started = time.perf_counter()
        with nullcontext(progress) if progress else self.open_bar() as progress:
            codes = build(missing, self._capability, progress)
        self.seconds += time.perf_counter() - started
        for spec in missing:
            self._loaded[spec.name] = Kernel(spec, codes[spec], self._resources)

    def build_apart(self, specs: Sequence[KernelSpec]) -> list[Kernel]:
        """Kernels that are not found by name, because others are called so: those that write timestamps."""
        codes = build(specs, self._capability)
        return [Kernel(spec, codes[spec], self._resources) for spec in specs]

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._loaded:
            self.require([self._planned[name].spec])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)
