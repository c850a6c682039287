"""Views, the memory plan, the arena and the KV cache: every buffer in its place, none over another."""

import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numba_atomflow.errors import BackendError
from numba_atomflow.memory import arena
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.kv_cache import kv_cache_buffer, layer_cache
from numba_atomflow.memory.plan import ALIGNMENT, POOLS, Buffer, plan_memory
from numba_atomflow.memory.view import view_of

# --- views -------------------------------------------------------------------------------------------------------


def test_a_view_shows_the_memory_of_its_array() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    view = view_of("x", array)
    assert (view.shape, view.dtype, view.nbytes, view.readonly) == ((2, 3, 4), "float32", 96, False)
    view.host_array()[1, 2, 3] = -1
    assert array[1, 2, 3] == -1


def test_rows_and_indices_of_a_view_are_those_of_the_array() -> None:
    array = np.arange(60, dtype=np.int32).reshape(5, 3, 4)
    view = view_of("x", array)
    np.testing.assert_array_equal(view.rows(1, 4).host_array(), array[1:4])
    np.testing.assert_array_equal(view.index(2).host_array(), array[2])
    np.testing.assert_array_equal(view.index(4, 1).host_array(), array[4, 1])
    np.testing.assert_array_equal(view.index(4, 1).rows(3, 4).host_array(), array[4, 1, 3:4])
    assert view.rows(1, 4).index(0).name == "x"


def test_columns_of_a_view_are_those_of_the_array() -> None:
    array = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    view = view_of("x", array)
    assert view.columns(0, 5) == view
    part = view.columns(1, 4)
    np.testing.assert_array_equal(part.host_array(), array[..., 1:4])
    np.testing.assert_array_equal(part.rows(1, 3).columns(1, 2).index(0).host_array(), array[1, :, 2:3])
    assert (part.nbytes, part.extent, part.strides) == (3 * 4 * 3 * 4, 4 * (60 - 2), (80, 20, 4))
    with pytest.raises(IndexError, match="columns 1:6 of view x, which has 5"):
        view.columns(1, 6)


def test_what_other_libraries_see_of_a_view() -> None:
    view = view_of("x", np.zeros((3, 8), np.float16)).columns(0, 6)
    interface = view.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["strides"]) == ((3, 6), "<f2", (16, 2))
    assert interface["data"] == (view.address, False)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2), (5, 6)])
def test_rows_outside_a_view_are_refused(start: int, stop: int) -> None:
    view = view_of("the cache", np.zeros((5, 2), np.float32))
    with pytest.raises(IndexError, match=f"{start}:{stop} of view the cache, which has 5"):
        view.rows(start, stop)


def test_an_index_outside_a_view_is_refused() -> None:
    view = view_of("x", np.zeros((5, 2), np.float32))
    for indices in ((5,), (-1,), (0, 2)):
        with pytest.raises(IndexError):
            view.index(*indices)


def test_mapped_memory_cannot_be_written_through_a_view() -> None:
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    view = view_of("weights", array)
    assert view.readonly
    for same in (view, view.rows(1, 3), view.index(0)):
        assert not same.host_array().flags.writeable


def test_a_view_of_scattered_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="x is not contiguous"):
        view_of("x", np.zeros((4, 4))[:, :2])


# --- the plan ----------------------------------------------------------------------------------------------------

BUFFERS = st.lists(
    st.builds(
        Buffer,
        pool=st.sampled_from(POOLS),
        name=st.text("abcdef", min_size=1, max_size=6),
        shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
        dtype=st.sampled_from(["float32", "int8", "int64", "float16"]),
    ),
    max_size=12,
    unique_by=lambda buffer: buffer.name,
)


@given(BUFFERS)
@settings(deadline=None)
def test_buffers_are_aligned_do_not_overlap_and_keep_their_order(buffers: list[Buffer]) -> None:
    plan = plan_memory(buffers)
    assert sorted(b.name for b in plan.buffers) == sorted(b.name for b in buffers)
    end = 0
    for buffer, offset in zip(plan.buffers, plan.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + buffer.nbytes
    assert end <= plan.total < end + ALIGNMENT
    by_pool = [[b for b in buffers if b.pool == pool] for pool in POOLS]
    assert list(plan.buffers) == [b for group in by_pool for b in group]
    assert plan.pool_bytes() == {
        pool: sum(int(np.prod(b.shape)) * np.dtype(b.dtype).itemsize for b in group)
        for pool, group in zip(POOLS, by_pool, strict=True)
    }


def test_two_buffers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="share a name: q"):
        plan_memory([Buffer("activations", "q", (1,), "int8"), Buffer("workspace", "q", (2,), "int8")])


# --- the arena ---------------------------------------------------------------------------------------------------


@given(BUFFERS)
@settings(deadline=None)
def test_what_is_written_to_a_buffer_stays_there(buffers: list[Buffer]) -> None:
    host = HostArena(plan_memory(buffers))
    for number, buffer in enumerate(buffers, start=1):
        array = host[buffer.name].host_array()
        assert array.shape == buffer.shape
        assert array.dtype == buffer.dtype
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.any()
        array[...] = number
    for number, buffer in enumerate(buffers, start=1):
        assert np.all(host[buffer.name].host_array() == number)


def test_memory_that_the_machine_refuses_is_a_sentence() -> None:
    plan = plan_memory([Buffer("kv cache", "kv_cache", (1 << 40, 1 << 10), "float32")])
    with pytest.raises(BackendError, match=r"refused 4503599\.6 GB .* use a smaller --max-seq-len"):
        HostArena(plan)


def test_the_arena_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = mmap.mmap

    def recorded(handle: int, size: int, *flags: int) -> mmap.mmap:
        sizes.append(size)
        return real(handle, size, *flags)

    monkeypatch.setattr(arena.mmap, "mmap", recorded)
    plan = plan_memory([Buffer("activations", name, (100,), "float32") for name in "abc"])
    HostArena(plan)
    assert sizes == [plan.total] == [3 * 512]


# --- the KV cache ------------------------------------------------------------------------------------------------


def test_layers_of_the_cache_are_apart_and_contiguous() -> None:
    buffer = kv_cache_buffer(layers=3, positions=5, kv_dim=8, dtype="float32")
    assert (buffer.pool, buffer.nbytes) == ("kv cache", 3 * 2 * 5 * 8 * 4)
    host = HostArena(plan_memory([buffer]))
    cache = host[buffer.name]
    for layer in range(3):
        for which, view in enumerate(layer_cache(cache, layer)):
            assert view.shape == (5, 8)
            assert view.host_array().flags.c_contiguous
            view.host_array()[:] = 10 * layer + which
    flat = cache.host_array().reshape(6, -1)
    assert flat.min(axis=1).tolist() == flat.max(axis=1).tolist() == [0, 1, 10, 11, 20, 21]
