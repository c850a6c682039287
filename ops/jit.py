"""Compilation of CPU kernels, and the cache of compiled code.

`cpu_kernel` is numba's ``njit`` with this project's flags and an on-disk cache. Numba's own cache looks only at the
file of the compiled function: it would miss an edit in a function that the kernel *calls*. So the name of the cache
folder has a hash of every file in ``ops/``: after any edit there, everything is compiled again into a new folder.

Parallel loops run on the pool of `host.pool` where there is one, else on one of numba's. In a process that was forked
from one whose OpenMP pool runs, kernels raise BackendError.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numba
from llvmlite import binding
from llvmlite.binding import Linkage
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, UserProvidedCacheLocator
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.runtime import _nrt_python
from numba.np.ufunc import parallel as pool

from numba_atomflow import home
from numba_atomflow.errors import BackendError
from numba_atomflow.host import numba_settings
from numba_atomflow.host.pool import SYMBOLS, own_pool

_KEPT_CACHES = 4  # folders; older ones, of earlier states of ops/, are deleted

# Where there is no pool of our own: numba's OpenMP layer keeps its threads spinning between parallel loops, so that
# starting one costs 2 us. The TBB and workqueue layers put them to sleep, and waking one costs 20-130 us.
if config.THREADING_LAYER_PRIORITY == ["tbb", "omp", "workqueue"]:  # numba's own default
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
numba_settings.check()
own_pool()  # what compiled kernels call must be known before the first is loaded


def source_hash(target: str = "cpu") -> str:
    """Hash of every source file of ``ops/`` (names and contents): 16 hexadecimal digits.

    An edit in ``ops/cuda/`` changes that of the target "cuda" alone.
    """
    folder = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py") if target == "cuda" else folder.glob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def cache_folder(target: str = "cpu") -> Path | None:
    """Folder of code compiled for "cpu" or "cuda" from this state of ``ops/``; None if it cannot be written."""
    folder = home.compiled() / f"{target}-{source_hash(target)}{numba_settings.compiler_suffix()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()  # marks it as in use: pruning goes by age
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    _prune(folder, target)
    return folder


def _prune(current: Path, target: str) -> None:
    """Delete all but the most recently used cache folders of this target."""

    def last_used(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:  # another process has just deleted it
            return 0.0

    others = [path for path in current.parent.glob(f"{target}-*") if path != current]
    others.sort(key=last_used, reverse=True)
    for stale in others[_KEPT_CACHES - 1 :]:
        shutil.rmtree(stale, ignore_errors=True)


class _Locator(UserProvidedCacheLocator):  # type: ignore[misc]
    """Where a kernel's code is kept: the same place for every checkout and installation with this state of ``ops/``."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """The sub-folder of `config.CACHE_DIR`; numba's own has a hash of the path of the source file's folder."""
        if Path(py_file).resolve().parent == Path(__file__).resolve().parent:
            return "ops"
        return str(super().get_suitable_cache_subpath(py_file))


class _KernelCacheFiles(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)

    def reduce(self, cres: Any) -> Any:
        """What the cache keeps of a compiled kernel: numba's own, without the environments of numba's functions.

        Code uses the environment of its function only to handle Python objects, which kernels do not, and to make one
        known imports the function's module: those that allocate arrays import 5 MB.
        """
        *kept, environments = super().reduce(cres)
        return (*kept, tuple(e for e in environments if not e.globals["__name__"].startswith("numba.")))


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """numba's cache, except that a damaged or full one costs a compilation instead of an exception, and that loading
    from it is fast: numba's own prepares the compiler first, which imports a hundred modules, some of them scipy's.
    """

    _impl_class = _KernelCacheFiles

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code of a signature, or None: compile it."""
        try:
            _register_allocator()
            loaded = self._load_overload(sig, target_context)
        except Exception:  # unpickling damaged bytes can raise anything
            with suppress(OSError):
                self.flush()
            return None
        if loaded is not None:
            loaded.library._shared_module = None  # noqa: SLF001  what numba would inline elsewhere: names alone
        return loaded

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep compiled code, if that is possible."""
        with suppress(OSError):
            super().save_overload(sig, data)


@cache
def _register_allocator() -> None:
    """Make known what kernels that allocate memory call: numba's functions in C.

    numba's own way (`rtsys.initialize`) compiles some functions beside them, which every kernel has copies of.
    """
    for name, address in _nrt_python.c_helpers.items():
        binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


_SHARED = (Linkage.linkonce_odr, Linkage.weak_odr)  # how numba marks what may be defined several times
_LOCAL = (Linkage.internal, Linkage.private)


class _SelfContainedLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A kernel's machine code with private copies of the functions that it calls.

    numba emits a called function, the body of a parallel loop too, with "linkonce_odr": one copy in the library that it
    was compiled in, and one in every library that links it, which was optimised once more and may add floats in another
    order. Of all copies in a process the dynamic linker takes the one that was loaded first. So a kernel would compute
    other bits after a compilation than after a load from the cache, and other ones again if another kernel that calls
    the same function was loaded before. With internal linkage every library uses its own copy.

    What numba's thread pools would do is called by the names of our own, if it runs: the kernels of others in the same
    process keep theirs.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage in _SHARED:
                function.linkage = Linkage.internal
            elif own_pool() and function.name in SYMBOLS:
                function.name = SYMBOLS[function.name]
        super()._optimize_final_module()

    def serialize_using_object_code(self) -> Any:
        """What the cache keeps: the object code, and of its bitcode, which numba keeps to inline kernels elsewhere,
        only the names of what it defines. Nothing inlines a kernel, and parsing it would take 6 MB of memory.
        """
        name, kind, (code, _) = super().serialize_using_object_code()
        return name, kind, (code, _names_alone(self._final_module))


def _names_alone(module: Any) -> bytes:
    """Bitcode that defines the names that a module makes known, without their contents."""
    functions = [f for f in module.functions if not f.is_declaration and f.linkage not in _LOCAL]
    variables = [v for v in module.global_variables if not v.is_declaration and v.linkage not in _LOCAL]
    lines = [f'define void @"{function.name}"() {{ unreachable }}' for function in functions]
    lines += [f'@"{variable.name}" = global i8 0' for variable in variables]
    return bytes(binding.parse_assembly("\n".join(lines)).as_bitcode())


class _KernelCompiler(Compiler):  # type: ignore[misc]
    """numba's compiler, into a library of the above kind."""

    def define_pipelines(self) -> Any:
        """The passes are numba's own."""
        state = self.state
        if state.library is None:
            state.library = _SelfContainedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
            state.library.enable_object_caching()
        return super().define_pipelines()


def cpu_kernel(
    *, parallel: bool = True, inline: bool = False, exact: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile a function with numba for the CPU.

    ``fastmath`` lets LLVM reorder float32 sums into SIMD lanes and multiply by reciprocals, but keeps NaN and infinity
    (a NaN must be seen, not optimised away). ``error_model="numpy"`` drops the zero checks of divisions.

    Args:
        parallel: run ``prange`` loops on all cores.
        inline: the function is called by kernels only: it is compiled into its callers and needs no cache.
        exact: plain IEEE arithmetic in the order written, for results that must be the same bit for bit everywhere.
    """
    flags: dict[str, Any] = {
        "fastmath": set() if exact else {"reassoc", "contract", "nsz", "arcp", "afn"},
        "error_model": "numpy",
        "boundscheck": False,
    }
    kernel_flags = flags | {"parallel": parallel, "nogil": True, "pipeline_class": _KernelCompiler}

    def compile_it(function: Callable[..., Any]) -> Any:
        if inline:
            return numba.njit(**flags)(function)
        folder = cache_folder()
        if folder is None:
            return _guarded(numba.njit(**kernel_flags)(function))
        previous = config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(folder), ""
        try:
            kernel = numba.njit(**kernel_flags)(function)
            kernel._cache = _KernelCache(function)  # noqa: SLF001  as its enable_caching() does, with our class
            return _guarded(kernel)
        finally:
            config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = previous

    return compile_it


# --- forked processes ------------------------------------------------------------------------------------------------

_kernels: list[Any] = []
_pool_lost = False  # by a fork: GNU OpenMP's threads stay in the parent, and numba ends a child that calls them


def _guarded(kernel: Any) -> Any:
    """The kernel, registered for `_after_fork`."""
    _kernels.append(kernel)
    if _pool_lost:
        _disable(kernel)
    return kernel


def _after_fork() -> None:
    """In the child: start new threads, or disable all kernels, if calling one would end the process."""
    global _pool_lost  # noqa: PLW0603  a property of the process
    if own := own_pool():
        own.forget_threads()
        return
    if not pool._is_initialized or pool._threading_layer != "omp":  # noqa: SLF001  `threading_layer()` raises
        return
    omppool = import_module("numba.np.ufunc.omppool")  # loaded already: a compiled module without annotations
    if omppool.openmp_vendor == "GNU" and sys.platform == "linux":
        _pool_lost = True
        for kernel in _kernels:
            _disable(kernel)


def _disable(kernel: Any) -> None:
    """Remove the compiled code of a kernel: a call would compile it again, which raises."""
    kernel._compile_for_args = _refuse  # noqa: SLF001
    kernel._clear()  # noqa: SLF001


def _refuse(*_arguments: Any, **_named: Any) -> NoReturn:
    raise BackendError(
        "This process was forked from one that had run CPU kernels, and their threads do not survive that; "
        'start it by "spawn" or "forkserver" (multiprocessing.get_context), or fork before the first engine is loaded.'
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
