"""numba's environment variables and configuration file: used, or refused by name."""

import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import run
from cli_runner import environment
from numba.core import config

from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.host import numba_settings

IMPORT = "import sys; from numba_atomflow.cli import run; sys.exit(run(['info']))"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DISABLE_JIT", 1, "kernels must be compiled"),
        ("THREADING_LAYER", "bogus", "numba has tbb, omp"),
        ("THREADING_LAYER", 5, "numba has tbb, omp"),  # of a configuration file
        ("THREADING_LAYER_PRIORITY", ["tbb"], "in some order"),
        ("NUMBA_NUM_THREADS", 0, "number of threads"),
        ("NUMBA_NUM_THREADS", 1_000_000, "number of threads"),
        ("CPU_NAME", "nonsense", "LLVM has none of that name"),
        ("CPU_FEATURES", "+bogus", "LLVM has none of that name"),
    ],
)
def test_unsupported_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: object, words: str) -> None:
    monkeypatch.setattr(config, name, value)
    with pytest.raises(BackendError) as caught:
        numba_settings.check()
    message = str(caught.value)
    assert message.startswith(f"NUMBA_{name.removeprefix('NUMBA_')} is ")
    assert words in message
    assert message.endswith("in .numba_config.yaml.")  # the environment has no such variable


def test_a_missing_threading_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_settings, "_loads", lambda layer: layer == "workqueue")
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "tbb")
    for layer, available in {"tbb": False, "safe": False, "OMP": False, "workqueue": True, "default": True}.items():
        monkeypatch.setattr(config, "THREADING_LAYER", layer)
        if available:
            numba_settings.check()
        else:
            with pytest.raises(BackendError, match=f"NUMBA_THREADING_LAYER is '{layer}'.*remove it.$"):
                numba_settings.check()


def test_settings_that_change_code_have_a_cache_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_settings, "_COMPILER_DEFAULTS", {"OPT": 3, "BOUNDSCHECK": None})
    monkeypatch.setattr(config, "OPT", 3)
    monkeypatch.setattr(config, "BOUNDSCHECK", None)
    seen = {numba_settings.compiler_suffix()}
    assert seen == {""}
    monkeypatch.setattr(config, "OPT", 0)
    seen.add(numba_settings.compiler_suffix())
    monkeypatch.setattr(config, "BOUNDSCHECK", 1)
    seen.add(numba_settings.compiler_suffix())
    assert len(seen) == 3


def test_the_default_settings_are_numbas() -> None:
    """Other defaults would give every user two caches."""
    for name, default in numba_settings._COMPILER_DEFAULTS.items():
        assert hasattr(config, name), name
        assert isinstance(default, int | str | None)


@pytest.mark.parametrize("threads", ["0", "-1", "many", ""])
def test_numbers_of_threads(monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
    with pytest.raises(OptionError, match=f"^NUMBA_NUM_THREADS is '{threads}'"):
        numba_settings.check_import()


def run_import(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env=environment(tmp_path, **variables),
        text=True,
    )


@pytest.mark.parametrize(
    ("variables", "file", "names"),
    [
        ({"NUMBA_OPT": "fast"}, None, "NUMBA_OPT is 'fast'"),
        ({}, "boundscheck: many\n", "NUMBA_BOUNDSCHECK is 'many'"),
        ({}, "{ broken: [\n", ".numba_config.yaml"),
    ],
)
def test_unreadable_settings(tmp_path: Path, variables: dict[str, str], file: str | None, names: str) -> None:
    if file is not None:
        pytest.importorskip("yaml", reason="numba reads its configuration file with PyYAML alone")
        (tmp_path / ".numba_config.yaml").write_text(file)
    completed = run_import(tmp_path, **variables)
    assert (completed.returncode, completed.stdout) == (2, ""), completed.stderr
    assert len(completed.stderr.splitlines()) == 1, completed.stderr
    assert names in completed.stderr
