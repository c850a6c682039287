"""The checked driver calls and the process's one context, over a driver that is only pretended."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, Status

from numba_atomflow.device.driver import DriverError, call, open_device
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.errors import BackendError
from numba_atomflow.memory.device import DeviceArena
from numba_atomflow.memory.plan import Buffer, plan_memory
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.spec import F32, NUMBER, KernelSpec, kernel_spec


def fail(function: str) -> None:
    call(function)


def test_one_context_for_all_users_until_the_last_closes(pretended: PretendedDriver) -> None:
    first, second = open_device(), open_device()
    assert first is second
    assert (first.name, first.capability, first.driver_version) == ("Pretended GPU", (9, 0), (13, 0))
    first.close()
    assert "cuCtxDestroy" not in pretended.calls
    second.close()
    assert pretended.calls.count("cuCtxCreate") == pretended.calls.count("cuCtxDestroy") == 1
    third = open_device()
    assert third is not first
    third.close()


def test_the_context_is_current_for_a_while(pretended: PretendedDriver) -> None:
    device = open_device()
    del pretended.calls[:]
    with device.current():
        assert pretended.calls == ["cuCtxPushCurrent"]
    assert pretended.calls == ["cuCtxPushCurrent", "cuCtxPopCurrent"]
    device.close()


@pytest.mark.parametrize(
    ("status", "final", "advice"),
    [
        (Status.CUDA_ERROR_OUT_OF_MEMORY, False, "free memory on the GPU or use a smaller --max-seq-len"),
        (Status.CUDA_ERROR_ILLEGAL_ADDRESS, True, "start a new process to use the GPU again"),
    ],
)
def test_a_failed_call_is_one_sentence_and_a_final_one_takes_the_device_away(
    pretended: PretendedDriver, status: Status, final: bool, advice: str
) -> None:
    device = open_device()
    pretended.failing = {"cuMemAlloc": status}
    with pytest.raises(DriverError) as caught, device.current():
        fail("cuMemAlloc")
    assert str(caught.value) == (
        f"The GPU failed in cuMemAlloc: it went wrong ({status.name}); {advice}, or use --backend cpu."
    )
    assert caught.value.final == final
    later = open_device()
    assert (later is device) != final
    later.close()
    device.close()


def test_no_gpu_is_one_sentence(pretended: PretendedDriver) -> None:
    pretended.gpus = 0
    with pytest.raises(BackendError, match="sees no GPU; check CUDA_VISIBLE_DEVICES, or use --backend cpu"):
        open_device()


def test_each_gpu_has_a_context_of_its_own(pretended: PretendedDriver) -> None:
    pretended.gpus = 2
    first, second = open_device(0), open_device(1)
    assert (first.ordinal, second.ordinal) == (0, 1)
    assert first is not second
    assert open_device(1) is second
    first.close()
    second.close()
    assert not second.closed
    second.close()
    assert second.closed
    assert pretended.calls.count("cuCtxCreate") == pretended.calls.count("cuCtxDestroy") == 2


@pytest.mark.parametrize(
    ("gpus", "ordinal", "present"), [(1, 1, "one GPU, number 0"), (2, 2, "2 GPUs, numbers 0 to 1"), (2, -1, "2 GPUs")]
)
def test_an_ordinal_that_does_not_exist_is_one_sentence(
    pretended: PretendedDriver, gpus: int, ordinal: int, present: str
) -> None:
    pretended.gpus = gpus
    with pytest.raises(BackendError, match=f"no GPU number {ordinal}: the NVIDIA driver sees {present}"):
        open_device(ordinal)
    assert "cuCtxCreate" not in pretended.calls


def test_an_arena_allocates_once_and_clears_what_it_is_told(pretended: PretendedDriver) -> None:
    buffers = [
        Buffer("weights", "w", (100,), "float32"),
        Buffer("activations", "x", (3, 5), "float16"),
        Buffer("workspace", "y", (7,), "int64"),
    ]
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            arena = DeviceArena(plan_memory(buffers), owner.resources)
            arena.clear(("activations", "workspace"), stream=None)
    assert pretended.calls.count("cuMemAlloc") == 1
    assert pretended.cleared == [(arena["x"].address, 30), (arena["y"].address, 56)]
    assert arena.space_after("weights") == (arena["x"].address, arena.plan.total - 512)
    assert pretended.calls.count("cuMemFree") == 1
    assert np.dtype(arena["x"].dtype) == np.float16


def test_a_plan_larger_than_what_is_free_is_refused_with_the_numbers(pretended: PretendedDriver) -> None:
    pretended.free_bytes = 1 << 32
    plan = plan_memory([Buffer("weights", "w", (1 << 30,), "float64")])
    with DeviceResources() as owner:
        owner.open()
        refusal = r"needs 8\.59 GB on the GPU \(weights 8\.59, .* use --backend cpu\."
        with owner.current(), pytest.raises(BackendError, match=refusal):
            DeviceArena(plan, owner.resources)
    assert "cuMemAlloc" not in pretended.calls


class OneNumber(NamedTuple):
    count: NUMBER


def spec_of(dependent: bool = False, cooperative: bool = False) -> KernelSpec:
    spec = kernel_spec("k", "module:factory", OneNumber, 96, 4096, dependent=dependent)
    return replace(spec, cooperative=cooperative)


class Arguments(NamedTuple):
    x: F32
    count: NUMBER


def test_named_arguments_are_packed_in_the_order_of_their_class(pretended: PretendedDriver) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    spec = kernel_spec("k", spec_of, Arguments, 96)
    assert spec.element_types == ("float32*", "int64")
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            kernel = Kernel(spec, b"code", owner.resources)
            launch = Launch(kernel, 132, Arguments(count=7, x=View("x", 4096, (5,), "float32")), stream=0)
            assert list(launch._words) == [0, 0, 5, 4, 4096, 5, 4, 7]
            with pytest.raises(TypeError, match="k takes a Arguments, not a tuple"):
                Launch(kernel, 132, (View("x", 4096, (5,), "float32"), 7), stream=0)


@pytest.mark.parametrize("cooperative", [False, True])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_launch_has_the_attributes_of_its_spec(
    pretended: PretendedDriver, dependent: bool, cooperative: bool
) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            kernel = Kernel(spec_of(dependent=dependent, cooperative=cooperative), b"code", owner.resources)
            Launch(kernel, 132, OneNumber(7), stream=0).run()
    (config,) = pretended.launched
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes) == (132, 96, 4096)
    found = {attribute.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_"): attribute.value for attribute in config.attrs}
    assert config.numAttrs == len(found) == dependent + cooperative
    assert ("COOPERATIVE" in found) == cooperative
    assert ("PROGRAMMATIC_STREAM_SERIALIZATION" in found) == dependent
    if cooperative:
        assert found["COOPERATIVE"].cooperative == 1
    if dependent:
        assert found["PROGRAMMATIC_STREAM_SERIALIZATION"].programmaticStreamSerializationAllowed == 1


def test_a_cooperative_grid_that_does_not_fit_is_an_error(pretended: PretendedDriver) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    pretended.failing = {"cuLaunchKernelEx": Status.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE}
    with DeviceResources() as owner:
        owner.open()
        with owner.current():
            launch = Launch(
                Kernel(spec_of(cooperative=True), b"code", owner.resources), 1 << 20, OneNumber(7), stream=0
            )
            with pytest.raises(DriverError, match="in cuLaunchKernelEx") as caught:
                launch.run()
    assert caught.value.code == "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    assert not caught.value.final
