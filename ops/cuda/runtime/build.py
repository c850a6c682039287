"""From kernel specs to machine code: compiled in parallel processes and cached on disk.

No driver is needed: numba compiles to PTX, and nvJitLink assembles a cubin, for any architecture. The name of the cache
folder has a hash of every file of ``ops/``, so that any edit there recompiles everything; a file's name has the spec,
the architecture and the versions of the compilers. Numba takes 2-7 s per kernel, mostly in Python: hence processes.
They are started as ``python -m numba_atomflow.ops.cuda.runtime.build``, because `multiprocessing` would run a user's
script again if it has no ``if __name__ == "__main__"``.
"""

import base64
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from numba_atomflow.errors import BackendError
from numba_atomflow.ops import jit
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec
from numba_atomflow.ops.ptx import compiling_for
from numba_atomflow.utils.interrupts import deferred_interrupts
from numba_atomflow.utils.progress import Progress

_DIGEST_BYTES = 32
_MAX_WORKERS = 16


def compile_spec(spec: KernelSpec, capability: tuple[int, int]) -> bytes:
    """Machine code for one architecture: a cubin with one kernel, named `spec.name` unless it is `arch_specific`."""
    if spec.arch_specific:
        return assemble_arch_specific(spec.make(), spec, capability)[0]
    return assemble(make_ptx(spec.make(), spec, capability), capability)[0]


def make_ptx(kernel: Any, spec: KernelSpec, capability: tuple[int, int]) -> str:
    """PTX of a kernel, with `spec.name` in place of its mangled name.

    Args:
        kernel: `spec.make()`.
    """
    from numba import cuda

    share_scopes()
    bounds = kernel.targetoptions["launch_bounds"]  # `compile_ptx` ignores them
    with compiling_for(capability):
        ptx, _ = cuda.compile_ptx(kernel.py_func, spec.numba_signature(), cc=capability, launch_bounds=bounds)
    return rename(str(ptx), spec.name)


@cache
def share_scopes() -> None:
    """Halve the time of compiling, with the same PTX.

    numba copies an inlined function's IR with `copy.deepcopy`. Each variable in it refers to the scope of all
    variables, which would be copied too, although nothing writes to the copy.
    """
    from numba.cuda.core import ir  # type: ignore[import-not-found]

    ir.Scope.__deepcopy__ = lambda self, _: self


def rename(ptx: str, name: str) -> str:
    """PTX with a readable name for its kernel."""
    mangled = re.search(r"\.entry\s+([\w$]+)\(", ptx)
    if mangled is None:
        raise RuntimeError(f"numba generated no kernel for {name}")
    return ptx.replace(mangled[1], name)


def assemble(ptx: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """A cubin of PTX, and the assembler's log of registers and spills."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_{}{}".format(*capability), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    return bytes(linker.link("cubin").code), str(linker.get_info_log())


def assemble_arch_specific(kernel: Any, spec: KernelSpec, capability: tuple[int, int]) -> tuple[bytes, str]:
    """A cubin of a kernel that has instructions of this architecture only, and the assembler's log.

    By link-time optimisation: nvJitLink makes relocatable code of PTX, in which ptxas ignores setmaxnreg (C7504) and
    waits for every wgmma before the next (C7509), which costs a third of the speed. The kernel keeps its mangled name.

    Args:
        kernel: `spec.make()`.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda

    share_scopes()
    bounds = kernel.targetoptions["launch_bounds"]
    with compiling_for(capability):
        ir, _ = cuda.compile(
            kernel.py_func,
            spec.numba_signature(),
            cc=(*capability, "a"),
            launch_bounds=bounds,
            output="ltoir",
            device=False,
            abi="numba",
        )
    options = LinkerOptions(arch="sm_{}{}a".format(*capability), link_time_optimization=True, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ltoir(ir), options=options)
    return bytes(linker.link("cubin").code), str(linker.get_info_log())


def entry_name(code: bytes) -> str:
    """Name of the only kernel of a cubin: that of its section of instructions, ".text.NAME".

    Source: the ELF-64 object file format, section headers.
    """
    (table,), (size, count, names) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HHH", code, 58)
    headers = [struct.unpack_from("<IIQQQQ", code, table + size * i) for i in range(count)]  # name, .., .., .., offset
    start = headers[names][4]
    sections = [code[start + header[0] : code.index(0, start + header[0])].decode() for header in headers]
    kernels = [section.removeprefix(".text.") for section in sections if section.startswith(".text.")]
    if len(kernels) != 1:
        raise RuntimeError(f"a cubin with {len(kernels)} kernels in place of one")
    return kernels[0]


# --- the cache -------------------------------------------------------------------------------------------------------


@cache
def compilers() -> str:
    """Versions of the compilers."""
    found = []
    libraries = ("nvidia-nvvm", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-nvjitlink")
    for package in ("numba", "numba-cuda", "cuda-core", *libraries, *(f"{library}-cu12" for library in libraries)):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def cache_path(spec: KernelSpec, capability: tuple[int, int]) -> Path | None:
    """The cache file of a kernel's machine code; None if the cache cannot be written."""
    folder = jit.cache_folder("cuda")
    if folder is None:
        return None
    tool = hashlib.sha256(compilers().encode()).hexdigest()[:8]
    return folder / f"{spec.name}-sm_{capability[0]}{capability[1]}-{spec.digest()}-{tool}.cubin"


def read_cached(path: Path | None) -> bytes | None:
    """The machine code in a cache file; None if it is missing or damaged."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def write_cached(path: Path | None, code: bytes) -> None:
    """Cache machine code, if possible: with a full disk it is compiled again the next time."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        partial.write_bytes(hashlib.sha256(code).digest() + code)
        partial.replace(path)
    with suppress(OSError):
        partial.unlink(missing_ok=True)


# --- building --------------------------------------------------------------------------------------------------------


def build(
    specs: Sequence[KernelSpec], capability: tuple[int, int], progress: Progress | None = None
) -> dict[KernelSpec, bytes]:
    """Machine code of all specs, from the cache or compiled.

    `progress` is called on the caller's thread.

    Raises:
        BackendError: the compiler is not installed, or failed.
    """
    done: dict[KernelSpec, bytes] = {}
    missing = []
    for spec in specs:
        code = read_cached(cache_path(spec, capability))
        if code is None:
            missing.append(spec)
        else:
            done[spec] = code
    if missing:
        _check_compiler()
        if progress:
            progress("compiling GPU kernels", len(done), len(specs))

        def report(spec: KernelSpec, code: bytes) -> None:
            write_cached(cache_path(spec, capability), code)
            done[spec] = code
            if progress:
                progress(f"compiled {spec.name}", len(done), len(specs))

        _compile_in_parallel(missing, capability, report)
    return done


def missing_compiler() -> str | None:
    """A library of the compiler that is not installed; None if all are. A plain install has none of them."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return "cuda-python"
    for name in ("nvvm", "nvrtc", "nvJitLink"):
        try:
            load_nvidia_dynamic_lib(name)
        except RuntimeError:  # the class that it raises for a missing library
            return name
    return None


def _check_compiler() -> None:
    missing = missing_compiler()
    if missing:
        raise BackendError(
            f"The GPU's compiler lacks {missing}; pip install 'numba-atomflow[cu13]' (or [cu12] for "
            "CUDA 12), or use --backend cpu."
        )


def _compile_in_parallel(
    specs: Sequence[KernelSpec], capability: tuple[int, int], report: Callable[[KernelSpec, bytes], None]
) -> None:
    """Each worker takes the next spec when it has finished one; the first failure stops all."""
    waiting: SimpleQueue[KernelSpec] = SimpleQueue()
    for spec in specs:
        waiting.put(spec)
    finished: SimpleQueue[tuple[KernelSpec, bytes, str]] = SimpleQueue()
    workers: list[_Worker] = []

    def serve(worker: _Worker) -> None:
        while True:
            try:
                spec = waiting.get_nowait()
            except Empty:
                return
            finished.put((spec, *worker.compile(spec, capability)))

    try:
        try:
            for _ in range(min(len(specs), len(os.sched_getaffinity(0)), _MAX_WORKERS)):
                with deferred_interrupts():
                    workers.append(_Worker())
                threading.Thread(target=serve, args=(workers[-1],), daemon=True).start()
        except (OSError, RuntimeError) as error:  # no more processes, or no more threads
            raise BackendError(f"The GPU's compiler could not be started ({error}); use --backend cpu.") from error
        for _ in specs:
            spec, code, failure = finished.get()
            if failure:
                raise BackendError(
                    f"A GPU kernel could not be compiled ({spec.name}: {failure}); use --backend cpu, and report this."
                )
            report(spec, code)
    finally:  # also after Ctrl-C: no worker survives
        with deferred_interrupts():
            for worker in workers:
                worker.stop()


class _Worker:
    """A Python process that compiles specs, one per line of its standard input."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment.pop("NUMBA_ENABLE_CUDASIM", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "numba_atomflow.ops.cuda.runtime.build"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the parent, which stops its workers
            text=True,
        )

    def compile(self, spec: KernelSpec, capability: tuple[int, int]) -> tuple[bytes, str]:
        """Machine code, or a description of the failure."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return b"", "the compiler's process has no pipes"
        try:
            stdin.write(base64.b64encode(pickle.dumps((spec, capability))).decode() + "\n")
            stdin.flush()
            answer = json.loads(stdout.readline())
        except (OSError, ValueError):
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return b"", f"the compiler's process {how}"
        return base64.b64decode(answer["code"]), str(answer["failure"])

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _work() -> None:
    """The worker's main loop: a spec per line in, an answer per line out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with answers
    for line in sys.stdin:
        spec, capability = pickle.loads(base64.b64decode(line))  # noqa: S301  from the parent process
        code, failure = b"", ""
        try:
            code = compile_spec(spec, capability)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        answers.write(json.dumps({"code": base64.b64encode(code).decode(), "failure": failure}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _work()
