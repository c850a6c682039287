"""Number formats: sizes, converters per chip, and which tensor of a checkpoint has which."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow.checkpoint.format import DTYPES, tensor_layout
from numba_atomflow.model.formats import HEAD_FORMATS, HeadFormat, head_part, matrix_format
from numba_atomflow.ops.formats import FP8_E4M3, FP8_E4M3_BITS, FP16, WeightFormat


@pytest.mark.parametrize("weights", [FP8_E4M3, FP16], ids=lambda weights: weights.name)
@pytest.mark.parametrize("in_features", [64, 128, 130, 576])
def test_bytes_of_a_row_are_those_of_a_checkpoint(weights: WeightFormat, in_features: int) -> None:
    geometry = tiny_geometry(hidden=in_features, heads=1, kv_heads=1, head_dim=64)
    layout = tensor_layout(geometry, "fp16" if weights is FP16 else "fp8")
    part = head_part(geometry)
    tensors = [layout[name] for name in (f"{part}.weight", f"{part}.scale") if name in layout]
    assert len(tensors) == 1 + weights.scaled
    assert weights.row_bytes(in_features) == sum(shape[1] * DTYPES[dtype].itemsize for dtype, shape in tensors)


@pytest.mark.parametrize("head", ["fp8", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_lm_head_has_the_format_of_the_option(head: HeadFormat, tied: bool) -> None:
    geometry = replace(tiny_geometry(), tied_embeddings=tied)
    formats = {part: matrix_format(geometry, part, head) for part in ("embedding", "vocabulary", "layer.0.qkv")}
    assert formats[head_part(geometry)] == HEAD_FORMATS[head]
    assert formats["layer.0.qkv"] == FP8_E4M3
    assert tied or formats["embedding"] == FP8_E4M3


def test_a_chip_has_one_converter_for_fp8() -> None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from numba_atomflow.ops.cuda.layout.converters import CONVERTERS
    from numba_atomflow.ops.cuda.runtime.chip import Chip

    for capability, expected in (((8, 0), FP8_E4M3_BITS), ((8, 9), FP8_E4M3), ((9, 0), FP8_E4M3)):
        chip = Chip(sms=1, shared_bytes=1 << 17, capability=capability)
        assert chip.native(FP8_E4M3) == chip.native(FP8_E4M3_BITS) == expected
        assert chip.native(FP16) == FP16
    for converter in CONVERTERS.values():
        assert sorted(converter.byte_order) == [0, 1, 2, 3]
        assert np.log2(converter.scale_factor) % 1 == 0, "not exact"
