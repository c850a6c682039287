"""A mapped file that becomes shorter must not end the process.

Reading a page that lies behind the end of its file raises SIGBUS in the thread that reads, which may be one of a
kernel's own. Python's signal handlers never get to run then: the instruction is tried again before they would. So the
handler here is machine code, made from the text below by LLVM, which numba brings. It looks the address up in a table
of mappings, puts zeros in place of the whole mapping by one `mmap`, marks the table, and returns: the read goes on.
Whoever owns the mapping asks `Watch.faulted` afterwards, and refuses the results.

Faults elsewhere go to the handler that was there before; without one, the process ends by SIGBUS as it would have.
Only system calls that may be made in a signal handler are made.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import signal
import sys
import threading
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba_atomflow import home
from numba_atomflow.errors import AtomFlowError

SLOTS = 1024  # mappings that are watched at once
_SIGACTION_BYTES = 152  # of glibc and musl on 64-bit Linux: handler, mask of 128 bytes, flags, restorer
_FLAGS_AT = 136
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_MAP_ZEROS = 0x32  # private, anonymous, at this very address

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
    """One mapping in the handler's table, for as long as the mapping lives.

    Args:
        mapped: of a file; pages of it are replaced by zeros when the file has become too short for them.
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
        """The mapping is gone."""
        if self._slot is not None:
            self._end()

    @property
    def faulted(self) -> bool:
        """Whether a read of the mapping met a page that the file does not have any more."""
        return self._slot is not None and self._slot[2] != 0


class _Table:
    """The handler's table, which both sides can see. Slots are taken and given back by one thread at a time."""

    def __init__(self, address: int) -> None:
        self.slots = (ctypes.c_int64 * 3 * SLOTS).from_address(address)
        self._free = list(range(SLOTS))

    def take(self, start: int, end: int) -> int | None:
        """A slot for the bytes from `start` to `end`, which is written last: the handler may look at any moment.

        None if there is none left: then this mapping does without.
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
        """The bytes are not of a mapping any more."""
        slot = self.slots[index]
        slot[1] = 0
        slot[0] = 0
        self._free.append(index)


_lock = threading.Lock()


def _table() -> _Table | None:
    """The table of the installed handler; None where there is none."""
    with _lock:
        return _install()


@cache
def _install() -> _Table | None:
    """Build the handler, or load it, and install it. It stays for the life of the process, and of its forks."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None  # where structures are laid out otherwise, a change is only found after the fact
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    module = binding.parse_assembly("")
    engine = binding.create_mcjit_compiler(module, machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(_object_code(machine)))
    engine.finalize_object()
    _kept.append(engine)  # its memory holds the code
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    previous = engine.get_global_value_address("previous")
    sigaction(signal.SIGBUS, None, ctypes.c_void_p(previous))  # it must be there before the handler is
    action = ctypes.create_string_buffer(_SIGACTION_BYTES)
    ctypes.c_void_p.from_buffer(action).value = engine.get_function_address("handler")
    ctypes.c_int.from_buffer(action, _FLAGS_AT).value = _SA_SIGINFO | _SA_ONSTACK
    if sigaction(signal.SIGBUS, action, None):
        return None
    return _Table(engine.get_global_value_address("slots"))


_kept: list[object] = []


def _object_code(machine: Any) -> bytes:
    """The handler for this processor, compiled or from the cache: compiling takes 15 ms, reading 0.1."""
    from llvmlite import binding

    about = f"{machine.triple} {binding.llvm_version_info} {_CODE}"
    name = f"fault-handler-{hashlib.sha256(about.encode()).hexdigest()[:16]}.o"
    path: Path | None = None
    with suppress(AtomFlowError, OSError):
        path = home.compiled() / name
        digest, code = (data := path.read_bytes())[:32], data[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
    code = bytes(machine.emit_object(binding.parse_assembly(_CODE)))
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.partial-{os.getpid()}")
            partial.write_bytes(hashlib.sha256(code).digest() + code)
            partial.replace(path)
    return code
