"""numba's settings: environment variables NUMBA_... and .numba_config.yaml in the current folder.

Settings with which the kernels cannot run are refused in a sentence; all others are left to numba.
"""

import os
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from numba_atomflow.errors import BackendError, OptionError

CONFIG_FILE = Path(".numba_config.yaml")
OWN_PREFIX = "NUMBA_ATOMFLOW"
MOST_THREADS = 4096  # numba aborts the process if the system refuses to start one

# Settings that change the generated code, beyond the CPU's name and features, with numba's defaults.
_COMPILER_DEFAULTS = {
    "BOUNDSCHECK": None,
    "OPT": 3,
    "LOOP_VECTORIZE": 1,
    "SLP_VECTORIZE": 0,
    "DISABLE_INTEL_SVML": 0,
    "DEBUGINFO_DEFAULT": 0,
    "EXTEND_VARIABLE_LIFETIMES": 0,
    "DEBUG_ARRAY_OPT_RUNTIME": 0,
    "DEBUG_NRT": 0,
    "LLVM_REFPRUNE_PASS": 1,
    "LLVM_REFPRUNE_FLAGS": "all",
    "PARFOR_MAX_TUPLE_SIZE": 100,
    "THREADING_LAYER": "default",
}

_LAYERS = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}
_ALIASES = {"default": ("omp", "tbb", "workqueue"), "safe": ("tbb",), "threadsafe": ("tbb", "omp")}

# Compiles a function for the CPU that the settings name. LLVM aborts the process on failure.
_PROBE = """
from llvmlite import binding as llvm
llvm.initialize_native_target(); llvm.initialize_native_asmprinter()
import sys
target = llvm.Target.from_default_triple().create_target_machine(cpu=sys.argv[1], features=sys.argv[2])
target.emit_object(llvm.parse_assembly("define float @f(float %x) { %y = fadd float %x, %x ret float %y }"))
"""


def check_import() -> None:
    """Import numba if there are settings for it, and refuse those that it would ignore with a warning.

    Raises:
        OptionError: a variable, or the configuration file, cannot be used.
    """
    names = [name for name in os.environ if name.startswith("NUMBA_") and not name.startswith(OWN_PREFIX)]
    if not names and not CONFIG_FILE.exists():
        return
    threads = os.environ.get("NUMBA_NUM_THREADS", "1")
    if not (threads.isdecimal() and int(threads) > 0):
        raise OptionError(
            f"NUMBA_NUM_THREADS is {threads!r}; set it to the number of threads, 1 or more, or remove it."
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import numba  # noqa: F401
        except Exception as error:  # of YAML, or of any of numba's settings
            first = str(error).split("\n")[0]
            raise OptionError(
                f"numba cannot be started with {_where(names)} ({first}); correct or remove them."
            ) from error
    for warning in caught:
        found = re.match(
            r"Environment variable '(\w+)' is defined but its associated value '(.*?)' could", str(warning.message)
        )
        if found:
            name, value = found.groups()
            raise OptionError(f"{name} is {value!r}, which numba cannot use; correct or remove it{_in_file(name)}.")


def check() -> None:
    """Refuse settings with which kernels cannot run. To be called before the first kernel is declared.

    Raises:
        BackendError: there is such a setting.
    """
    from numba.core import config

    if config.DISABLE_JIT:
        _refuse("DISABLE_JIT", config.DISABLE_JIT, "kernels must be compiled")
    _check_threads(config)
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        _check_cpu(config)


def compiler_suffix() -> str:
    """A suffix for the folder of compiled code that identifies the settings: "" with numba's defaults."""
    import hashlib

    from numba.core import config

    values = {name: getattr(config, name, default) for name, default in _COMPILER_DEFAULTS.items()}
    if values == _COMPILER_DEFAULTS:
        return ""
    return "-" + hashlib.sha256(repr(sorted((k, str(v)) for k, v in values.items())).encode()).hexdigest()[:8]


def _check_threads(config: Any) -> None:
    if not 1 <= config.NUMBA_NUM_THREADS <= MOST_THREADS:
        _refuse("NUM_THREADS", config.NUMBA_NUM_THREADS, f"it must be a number of threads from 1 to {MOST_THREADS}")
    if sorted(config.THREADING_LAYER_PRIORITY) != sorted(_LAYERS):
        names = " ".join(config.THREADING_LAYER_PRIORITY)
        _refuse(
            "THREADING_LAYER_PRIORITY", names, "it must be omp, tbb and workqueue in some order, with spaces between"
        )
    layer = str(config.THREADING_LAYER).lower()
    if layer == "default":
        return
    layers = {name: (name,) for name in _LAYERS} | _ALIASES | {"forksafe": _forksafe()}
    if layer not in layers:
        _refuse("THREADING_LAYER", config.THREADING_LAYER, f"numba has {', '.join(layers)}")
    if not any(_loads(name) for name in layers[layer]):
        _refuse("THREADING_LAYER", config.THREADING_LAYER, "that threading layer cannot be loaded here")


def _forksafe() -> tuple[str, ...]:
    return ("tbb", "workqueue") if sys.platform == "linux" else ("tbb", "omp", "workqueue")


def _loads(layer: str) -> bool:
    from numba.np.ufunc import parallel

    try:
        if layer == "tbb":
            parallel._check_tbb_version_compatible()  # noqa: SLF001  as numba does, which raises where there is no TBB
        import_module(f"numba.np.ufunc.{_LAYERS[layer]}")
    except ImportError:
        return False
    return True


def _check_cpu(config: Any) -> None:
    import subprocess

    from llvmlite import binding

    name = binding.get_host_cpu_name() if config.CPU_NAME is None else config.CPU_NAME
    features = binding.get_host_cpu_features().flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, name, features]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if probe.returncode or "is not a recognized" in probe.stderr:
        setting = "CPU_NAME" if config.CPU_NAME is not None and "feature" not in probe.stderr else "CPU_FEATURES"
        _refuse(setting, getattr(config, setting), "LLVM has none of that name for this machine")


def _refuse(name: str, value: object, why: str) -> None:
    variable = f"NUMBA_{name}"
    raise BackendError(f"{variable} is {str(value)!r}, and {why}; correct or remove it{_in_file(variable)}.")


def _in_file(variable: str) -> str:
    return "" if variable in os.environ else f" in {CONFIG_FILE}"


def _where(names: list[str]) -> str:
    return ", ".join([*names, *([str(CONFIG_FILE)] if CONFIG_FILE.exists() else [])])
