"""Single kernels against PyTorch's, and what this GPU reaches at most."""

import math

import torch

from numba_atomflow.ops.cuda.runtime import bandwidth
from prefill_bench.attention import AttentionLab
from prefill_bench.cases import Case, Measured
from prefill_bench.projections import ProjectionLab
from prefill_bench.torch_gpu import Run, TorchGpu

_READ_BYTES = 1 << 30
_SIDE = 8192  # of the square matrices whose product shows the rate of the tensor cores


class KernelLab:
    """One context for all cases."""

    def __init__(self) -> None:
        self._gpu = TorchGpu()
        self._projections, self._attention = ProjectionLab(self._gpu), AttentionLab(self._gpu)

    def measure(self, case: Case) -> Measured:
        """Measure a case of the parts ceilings, projections and attention."""
        match case.part:
            case "ceilings":
                return self._ceilings()
            case "projections":
                return self._projections.measure(case)
            case "attention":
                self._projections.close()  # frees the weights
                return self._attention.measure(case)
        raise ValueError(f"kernels have no part {case.part}")

    def _ceilings(self) -> Measured:
        """Reading memory, and a large product of float16 matrices by cuBLAS."""
        gpu = self._gpu
        source = torch.randint(1 << 30, (_READ_BYTES // 4,), dtype=torch.int32, device=gpu.device)
        total = torch.zeros(1, dtype=torch.int32, device=gpu.device)
        readers = {"loads": bandwidth.read_kernel(gpu.chip.sms)}
        if gpu.chip.capability >= (9, 0):
            readers["TMA"] = bandwidth.bulk_read_kernel(gpu.chip.sms)
        gpu.load(*readers.values())
        sides: dict[str, tuple[Run, int]] = {}
        for name, planned in readers.items():
            launch = gpu.launch(planned, {"source": source, "total": total})
            sides[f"{name}, GB/s"] = (lambda _, launch=launch: launch.run()), 1
        a, b = (torch.randn(_SIDE, _SIDE, device=gpu.device).half() for _ in range(2))
        product = torch.empty_like(a)
        rate = f"cuBLAS fp16 {_SIDE}^3, TFLOP/s"
        sides[rate] = (lambda _: torch.mm(a, b, out=product)), 1
        seconds = gpu.alternate(sides)
        medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
        work = {name: 2 * math.pow(_SIDE, 3) / 1e12 if name == rate else _READ_BYTES / 1e9 for name in medians}
        rates = {name: work[name] / medians[name] for name in medians}
        return Measured(seconds, values=rates, notes={"GPU": torch.cuda.get_device_name()})

    def close(self) -> None:
        """Free everything."""
        self._projections.close()
        self._gpu.close()
