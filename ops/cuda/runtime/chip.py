"""What the cutting of work depends on: a GPU in a few numbers."""

from dataclasses import dataclass

from numba_atomflow.device.driver import Device


@dataclass(frozen=True)
class Chip:
    """What the cutting of work depends on.

    Attributes:
        capability: compute capability.
        shared_bytes: the most shared memory of a block.
    """

    sms: int
    shared_bytes: int
    capability: tuple[int, int]

    @property
    def hardware_fp8(self) -> bool:
        """Whether it converts FP8 by an instruction."""
        return self.capability >= (8, 9)

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before the one before has ended."""
        return self.capability >= (9, 0)


def chip_of(device: Device) -> Chip:
    """What cutting the work must know of a device."""
    return Chip(device.sms, device.shared_bytes, device.capability)
