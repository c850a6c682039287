"""The properties of a GPU that kernels are tiled for."""

from dataclasses import dataclass, replace

from numba_atomflow.device.driver import Device
from numba_atomflow.ops.formats import WeightFormat


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that kernels are tiled for.

    Attributes:
        sms: number of SMs.
        shared_bytes: largest shared memory of a CTA.
        capability: compute capability.
    """

    sms: int
    shared_bytes: int
    capability: tuple[int, int]

    @property
    def fp8_converter(self) -> str:
        """How FP8 becomes float16: by the `cvt` instruction since sm_89, else by integer instructions ("bits")."""
        return "cvt" if self.capability >= (8, 9) else "bits"

    def native(self, weights: WeightFormat) -> WeightFormat:
        """The format with the converter that this GPU has."""
        return replace(weights, converter=self.fp8_converter) if weights.converter in {"cvt", "bits"} else weights

    @property
    def dependent_launch(self) -> bool:
        """Whether it has programmatic dependent launch."""
        return self.capability >= (9, 0)


def chip_of(device: Device) -> Chip:
    """The properties of an open device."""
    return Chip(device.sms, device.shared_bytes, device.capability)
