"""The GPUs that share a model: opened, compared, and given access to each other's memory."""

from collections import Counter
from collections.abc import Sequence

from numba_atomflow.device.driver import Device, gpu_count
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.errors import BackendError
from numba_atomflow.ops.cuda.runtime.chip import chip_of


def ranks_per_gpu(ordinals: Sequence[int]) -> int:
    """How many ranks each GPU has: more than one only to test without a second GPU.

    Raises:
        BackendError: there are not so many GPUs, or some have more ranks than others.
    """
    present = gpu_count()
    missing = [ordinal for ordinal in ordinals if not 0 <= ordinal < present]
    if missing:
        found = "1 GPU" if present == 1 else f"{present} GPUs"
        raise BackendError(
            f"There is no GPU number {missing[0]} for --gpus: the NVIDIA driver sees {found}, counted from 0; use "
            "fewer, or check CUDA_VISIBLE_DEVICES."
        )
    counts = set(Counter(ordinals).values())
    if len(counts) > 1:
        raise BackendError("A GPU is named more often than another one; name each once.")
    return counts.pop()


def connect(devices: Sequence[Device]) -> None:
    """Check that the GPUs are alike, and let each access the others' memory.

    Raises:
        BackendError: they are not, or cannot.
    """
    first = devices[0]
    for device in devices:
        if (device.name, chip_of(device), device.memory_bytes) != (first.name, chip_of(first), first.memory_bytes):
            raise BackendError(
                f"GPU {first.ordinal} is a {first.name} and GPU {device.ordinal} a {device.name}, or of another size; "
                "GPUs that share a model must be alike: choose by CUDA_VISIBLE_DEVICES, or use --gpus 1."
            )
    for device in devices:
        for other in devices:
            if other.ordinal != device.ordinal:
                device.enable_peer(other)


def open_all(ordinals: Sequence[int]) -> tuple[list[DeviceResources], list[Device]]:
    """An owner for each rank, and its GPU. After an error none is left open."""
    owners = [DeviceResources() for _ in ordinals]
    try:
        return owners, [owner.open(ordinal) for owner, ordinal in zip(owners, ordinals, strict=True)]
    except BaseException:
        for owner in owners:
            owner.close()
        raise
