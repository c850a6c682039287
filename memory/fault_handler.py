"""A SIGBUS handler, so that the truncation of a mapped file does not end the process.

Reading a page after the end of a mapped file raises SIGBUS in the reading thread, which may be a kernel's. A Python
signal handler cannot run then, because the faulting instruction is restarted first. This handler is machine code,
compiled by LLVM (part of numba) from the IR below. It looks up the address in a table of mappings, replaces the whole
mapping by zeros with one `mmap`, sets a flag in the table, and returns, so that the read is restarted. The owner of the
mapping then checks `Watch.faulted` and discards the results.

Other faults are forwarded to the previous handler; without one, the process ends by SIGBUS. The handler calls only
async-signal-safe functions.
"""

import ctypes
import mmap
import platform
import signal
import sys
import threading
import weakref
from functools import cache

from numba_atomflow.host.machine_code import load_code

SLOTS = 1024  # watched mappings
_SIGACTION_BYTES = 152  # of glibc and musl on 64-bit Linux: handler, mask of 128 bytes, flags, restorer
_FLAGS_AT = 136
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_MAP_ZEROS = 0x32  # private, anonymous, fixed address

_CODE = f"""
%slot = type {{ i64, i64, i64 }} ; first byte, end, whether a read has faulted
@slots = global [{SLOTS} x %slot] zeroinitializer
@previous = global [{_SIGACTION_BYTES} x i8] zeroinitializer, align 8

declare ptr @mmap(ptr, i64, i32, i32, i32, i64)
declare i32 @sigaction(i32, ptr, ptr)
declare i32 @raise(i32)

define void @handler(i32 %signal, ptr %info, ptr %context) {{
entry:
  %code_at = getelementptr i8, ptr %info, i64 8
  %code = load i32, ptr %code_at
  %is_fault = icmp sgt i32 %code, 0 ; and not sent by a process
  %address_at = getelementptr i8, ptr %info, i64 16
  %address = load i64, ptr %address_at
  br i1 %is_fault, label %look, label %others

look:
  %i = phi i64 [ 0, %entry ], [ %next, %miss ]
  %start_at = getelementptr [{SLOTS} x %slot], ptr @slots, i64 0, i64 %i, i32 0
  %end_at = getelementptr [{SLOTS} x %slot], ptr @slots, i64 0, i64 %i, i32 1
  %start = load atomic i64, ptr %start_at acquire, align 8
  %end = load atomic i64, ptr %end_at acquire, align 8
  %behind = icmp uge i64 %address, %start
  %before = icmp ult i64 %address, %end
  %inside = and i1 %behind, %before
  br i1 %inside, label %hit, label %miss

miss:
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, {SLOTS}
  br i1 %more, label %look, label %others

hit:
  %faulted_at = getelementptr [{SLOTS} x %slot], ptr @slots, i64 0, i64 %i, i32 2
  store atomic i64 1, ptr %faulted_at release, align 8
  %pages = inttoptr i64 %start to ptr
  %bytes = sub i64 %end, %start
  %zeros = call ptr @mmap(ptr %pages, i64 %bytes, i32 {mmap.PROT_READ}, i32 {_MAP_ZEROS}, i32 -1, i64 0)
  %got = ptrtoint ptr %zeros to i64
  %failed = icmp eq i64 %got, -1
  br i1 %failed, label %others, label %done

others:
  %theirs = load ptr, ptr @previous
  %number = ptrtoint ptr %theirs to i64
  %is_function = icmp ugt i64 %number, 1 ; neither SIG_DFL nor SIG_IGN
  br i1 %is_function, label %forward, label %default

forward:
  %flags_at = getelementptr i8, ptr @previous, i64 {_FLAGS_AT}
  %flags = load i32, ptr %flags_at
  %masked = and i32 %flags, {_SA_SIGINFO}
  %takes_info = icmp ne i32 %masked, 0
  br i1 %takes_info, label %forward_info, label %forward_number

forward_info:
  call void %theirs(i32 %signal, ptr %info, ptr %context)
  br label %done

forward_number:
  call void %theirs(i32 %signal)
  br label %done

default: ; a fault comes again when this returns; what was sent does not
  call i32 @sigaction(i32 %signal, ptr @previous, ptr null)
  br i1 %is_fault, label %done, label %send_again

send_again:
  call i32 @raise(i32 %signal)
  br label %done

done:
  ret void
}}
"""


class Watch:
    """Registers a mapping in the handler's table, for the lifetime of the mapping.

    Args:
        mapped: of a file; replaced by zeros if a page after the end of the file is read.
        address: of its first byte.
    """

    def __init__(self, mapped: mmap.mmap, address: int) -> None:
        self._slot: ctypes.Array[ctypes.c_int64] | None = None
        table = _table()
        index = None if table is None else table.take(address, address + len(mapped))
        if table is not None and index is not None:
            self._slot = table.slots[index]
            self._end = weakref.finalize(mapped, table.give_back, index)

    def end(self) -> None:
        """Remove the mapping from the table."""
        if self._slot is not None:
            self._end()

    @property
    def faulted(self) -> bool:
        """Whether a page after the end of the file was read."""
        return self._slot is not None and self._slot[2] != 0


class _Table:
    """The handler's table in shared memory. Only one thread at a time takes and returns slots."""

    def __init__(self, address: int) -> None:
        self.slots = (ctypes.c_int64 * 3 * SLOTS).from_address(address)
        self._free = list(range(SLOTS))

    def take(self, start: int, end: int) -> int | None:
        """A slot for the bytes from `start` to `end`; `end` is written last, because the handler may run at any time.

        None if the table is full: the mapping is then not watched.
        """
        if not self._free:
            return None
        index = self._free.pop()
        slot = self.slots[index]
        slot[2] = 0
        slot[0] = start
        slot[1] = end
        return index

    def give_back(self, index: int) -> None:
        """Clear a slot."""
        slot = self.slots[index]
        slot[1] = 0
        slot[0] = 0
        self._free.append(index)


_lock = threading.Lock()


def _table() -> _Table | None:
    """The table of the installed handler, or None."""
    with _lock:
        return _install()


@cache
def _install() -> _Table | None:
    """Compile or load the handler, and install it for the lifetime of the process and its forks."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None  # other struct layouts: changes are detected only by check_unchanged
    engine = load_code("fault-handler", _CODE)
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    previous = engine.get_global_value_address("previous")
    sigaction(signal.SIGBUS, None, ctypes.c_void_p(previous))  # the handler needs it
    action = ctypes.create_string_buffer(_SIGACTION_BYTES)
    ctypes.c_void_p.from_buffer(action).value = engine.get_function_address("handler")
    ctypes.c_int.from_buffer(action, _FLAGS_AT).value = _SA_SIGINFO | _SA_ONSTACK
    if sigaction(signal.SIGBUS, action, None):
        return None
    return _Table(engine.get_global_value_address("slots"))
