"""The checks of tests/gpu/test_prefill_kernels.py: right results pass, and wrong ones do not."""

from collections.abc import Callable
from typing import Any

import device_launch
import numpy as np
import pytest

pytest.importorskip("torch", reason="models the kernels: pip install torch")

from modelled_gpu import modelled_launch
from prefill_attention_sweeps import AttentionSweep, check_attention_chunk
from prefill_bench.compiled import H200, chip_with
from prefill_sweeps import (
    GemmSweep,
    NormSweep,
    all_kernels,
    check_gemm,
    check_norm,
)

SWEEPS = (
    GemmSweep("store", 200, 330, 16, capacity=48),
    GemmSweep("add", 64, 256, 32, capacity=64, k_tile=0),
    GemmSweep("swiglu", 84, 130, 16, capacity=48),
    GemmSweep("store", 72, 384, 16, capacity=48, bits=8),
    GemmSweep("qkv", 320, 128, 16, capacity=48, head_dim=64, heads=3, kv_heads=1),
)


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Kernels as formulas; called with what is done to their arguments after each launch."""

    def install(after: Callable[[Any], None]) -> None:
        def launch(planned: Any, arguments: Any, ctas: int = 0) -> None:
            modelled_launch(planned, arguments, ctas)
            after(arguments)

        monkeypatch.setattr(device_launch, "launch_planned", launch)

    install(lambda _: None)
    return install


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_what_a_gemm_should_write_passes(sweep: GemmSweep, damage: Any) -> None:
    for tokens in (1, 17, 40):
        check_gemm(sweep, tokens, H200)


def _output(io: Any) -> Any:
    return next(getattr(io, name) for name in ("y", "residual", "intermediate", "q") if hasattr(io, name))


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_a_wrong_element_of_a_gemm_fails(sweep: GemmSweep, damage: Any) -> None:
    def spoil(io: Any) -> None:
        _output(io).reshape(-1)[:4] = 0x7BFF if sweep.kind in ("qkv", "swiglu") else 1e30

    damage(spoil)
    with pytest.raises(AssertionError):
        check_gemm(sweep, 17, H200)


@pytest.mark.parametrize("sweep", SWEEPS[:3], ids=str)
def test_a_write_behind_the_last_tile_fails(sweep: GemmSweep, damage: Any) -> None:
    def spoil(io: Any) -> None:
        _output(io).reshape(-1)[-1] = 0

    damage(spoil)
    with pytest.raises(AssertionError, match="behind the last tile"):
        check_gemm(sweep, 17, H200)


@pytest.mark.parametrize(("where", "message"), [(slice(0, 1), "into the past"), (slice(-1, None), "values of padding")])
def test_a_write_beside_the_positions_of_a_step_fails(where: slice, message: str, damage: Any) -> None:
    def spoil(io: Any) -> None:
        io.values[where] = 0

    damage(spoil)
    with pytest.raises(AssertionError, match=message):
        check_gemm(SWEEPS[-1], 17, H200)


def test_partial_sums_that_are_not_reset_and_other_bits_fail(damage: Any) -> None:
    def leave(io: Any) -> None:
        io.partials[0] = 1

    damage(leave)
    with pytest.raises(AssertionError, match="partial sums are not zero"):
        check_gemm(SWEEPS[0], 17, H200)
    runs = iter(range(100))

    def drift(io: Any) -> None:
        if next(runs):
            io.y[0, 0] = np.nextafter(io.y[0, 0], np.float32(np.inf))

    damage(drift)
    with pytest.raises(AssertionError, match="not equal"):
        check_gemm(SWEEPS[0], 17, H200)


SWEEP = AttentionSweep(64, 3, 1, capacity=64)


def test_attention_and_norm_pass(damage: Any) -> None:
    for tokens, position in ((1, 0), (17, 5), (40, 63)):
        check_attention_chunk(SWEEP, tokens, position, H200)
    check_norm(NormSweep(330, (), 16), 5, H200)


def test_wrong_attention_fails(damage: Any) -> None:
    def spoil(io: Any) -> None:
        io.out[:8] = 0

    damage(spoil)
    with pytest.raises(AssertionError):
        check_attention_chunk(SWEEP, 17, 5, H200)

    def beyond(io: Any) -> None:
        io.out[-1] = 0

    damage(beyond)
    with pytest.raises(AssertionError, match="beyond"):
        check_attention_chunk(SWEEP, 17, 5, H200)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "12.0"])
def test_every_kernel_of_the_checks_can_be_planned(capability: str) -> None:
    chip = chip_with(capability)
    kernels = all_kernels(chip)
    assert len({kernel.spec for kernel in kernels}) == len(kernels) >= 60
    assert all(kernel.spec.shared_bytes <= chip.shared_bytes for kernel in kernels)
    assert any(kernel.spec.dependent for kernel in kernels) == chip.dependent_launch
