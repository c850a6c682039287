"""Machine code from LLVM's assembly language: for what must run without Python and without numba's run time.

llvmlite, which numba depends on, compiles it; the object code is cached with the kernels'.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba_atomflow import home
from numba_atomflow.errors import AtomFlowError

_engines: list[object] = []  # own the machine code, for the lifetime of the process


def load_code(name: str, code: str) -> Any:
    """llvmlite's execution engine with this module in it: addresses of functions and globals.

    Args:
        name: of the cached file. code: a module in LLVM's assembly language.
    """
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(_object_code(machine, name, code)))
    engine.finalize_object()
    _engines.append(engine)
    return engine


def _object_code(machine: Any, name: str, code: str) -> bytes:
    """The object code, from the cache or compiled: 0.1 ms or 15 ms."""
    from llvmlite import binding

    about = f"{machine.triple} {binding.llvm_version_info} {code}"
    file = f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.o"
    path: Path | None = None
    with suppress(AtomFlowError, OSError):
        path = home.compiled() / file
        digest, compiled = (data := path.read_bytes())[:32], data[32:]
        if hashlib.sha256(compiled).digest() == digest:
            return compiled
    compiled = bytes(machine.emit_object(binding.parse_assembly(code)))
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{file}.partial-{os.getpid()}")
            try:
                partial.write_bytes(hashlib.sha256(compiled).digest() + compiled)
                partial.replace(path)
            finally:  # where the disk is full, say
                partial.unlink(missing_ok=True)
    return compiled
