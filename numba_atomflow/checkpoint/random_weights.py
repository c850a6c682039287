"""A model of any geometry with random weights: speed does not depend on what the weights say.

Nothing is generated for every weight: codes are cut from one random block, which is repeated for tensors that are
larger. The block's length is a prime, so that no two rows of a tensor start at the same place in it.
"""

import math
import zlib
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import CODES, tensor_layout
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import shown
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.fp8 import LARGEST, decode_e4m3, encode_e4m3
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.utils.arguments import whole_number

BLOCK = 2**24 - 3  # bytes; the largest prime below 16 MiB
_DRAWS = 1 << 16  # different draws of a code


class RandomModel:
    """Stands wherever the engine takes a `Checkpoint`; it has no tokenizer.

    Codes are distributed as those of normal weights. Scales are such that a projection of inputs of unit variance has
    outputs of about unit variance, and differ from group to group; norms are near 1, biases near 0. The same seed gives
    the same arrays, whatever the order in which they are asked for.

    Args:
        geometry: of the model.
        seed: of all arrays.
        name: what it is called in reports.

    Raises:
        OptionError: the seed is negative.
    """

    def __init__(self, geometry: ModelGeometry, seed: int = 0, name: str = "random") -> None:
        seed = whole_number("seed", seed)
        if seed < 0:
            raise OptionError(f"seed is {shown(seed)}; it must be 0 or more.")
        self.geometry = geometry
        self.path = Path(name)
        self.text = TextAssets()
        self.metadata = {"quantiser": "{}", "source": f'{{"kind": "random", "seed": {seed}}}'}
        self._seed = seed
        self._layout = tensor_layout(geometry)
        self.payload_bytes = sum(
            math.prod(shape) * (1 if dtype == CODES else 4) for dtype, shape in self._layout.values()
        )

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._layout)

    def array(self, name: str) -> NDArray[Any]:
        """A read-only array, made now: codes as uint8, scales and norms as float32."""
        array: NDArray[Any]
        dtype, shape = self._layout[name]
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        if dtype == CODES:
            array = self._cut(int(rng.integers(BLOCK)), math.prod(shape)).reshape(shape)
        elif name.endswith(".scale"):
            columns = self._layout[name.removesuffix("scale") + "weight"][1][1]
            spread = 0.5 + rng.random(shape, np.float32)  # of mean 1 and variance 1 / 12
            array = spread * np.float32(1 / np.sqrt(columns * _code_variance() * (1 + 1 / 12)))
        else:
            centre = 1 if name.endswith("_norm") else 0  # else a bias
            array = np.asarray(centre + 0.1 * rng.standard_normal(shape, np.float32), np.float32)
        array.flags.writeable = False
        return array

    def check_unchanged(self) -> None:
        """Nobody else can change it."""

    def close(self) -> None:
        """Forget the random block."""
        vars(self).pop("_block", None)

    @cached_property
    def _block(self) -> NDArray[np.uint8]:
        rng = np.random.default_rng(self._seed)
        return _normal_codes()[rng.integers(_DRAWS, size=BLOCK, dtype=np.uint16)]

    def _cut(self, start: int, count: int) -> NDArray[np.uint8]:
        """`count` codes from `start` on, going round the block as often as it takes."""
        codes = np.empty(count, np.uint8)
        done = 0
        while done < count:
            piece = self._block[start : start + count - done]
            codes[done : done + len(piece)] = piece
            done += len(piece)
            start = 0
        return codes


@cache
def _normal_codes() -> NDArray[np.uint8]:
    """Codes of the normal distribution's quantiles, the largest of which becomes the largest code."""
    from scipy.special import ndtri

    quantiles = ndtri((np.arange(_DRAWS) + 0.5) / _DRAWS)
    return encode_e4m3((quantiles * (LARGEST / quantiles[-1])).astype(np.float32))


def _code_variance() -> float:
    """Mean square of the codes' values."""
    return float(np.mean(decode_e4m3(_normal_codes()).astype(np.float64) ** 2))
