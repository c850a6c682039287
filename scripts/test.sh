#!/usr/bin/env bash
# The test suite. What this machine cannot run is skipped with a reason.
#
#   bash scripts/test.sh                         some minutes: every part, but not every case
#   bash scripts/test.sh --all                   everything
#   bash scripts/test.sh tests/cpu/test_fp8.py   all tests of a file; arguments go to pytest (-k tokenizer, -x)
#
# Python: $PYTHON, else .venv, else the current one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    printf 'test: %s\n' "$*" >&2
    exit 1
}

# --- which Python ---------------------------------------------------------------------------------------------------

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
"$python" --version >/dev/null 2>&1 || die "$python cannot be run; run bash scripts/bootstrap.sh first."

has_pytest() { "$python" -c 'import pytest' 2>/dev/null; }

if ! has_pytest && [ "$python" = .venv/bin/python ]; then
    echo "test: pytest is not in .venv yet; installing the extra \`dev\`"
    "$python" -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
fi
has_pytest || die "$python has no pytest; run bash scripts/bootstrap.sh first, or $python -m pip install -e '.[dev]'."

# --- what to run ----------------------------------------------------------------------------------------------------

# tests/sim needs numba's CUDA simulator, which is switched on for a whole process: it gets a process of its own.
options=() here=() simulated=() parallel=() all=
for argument in "$@"; do
    path=${argument#"$PWD"/}
    path=${path#"$(pwd -P)"/} # where a symlink leads here, either name may be given
    path=${path#./}
    case $path in
        tests/sim | tests/sim/*) simulated+=("$path") ;;
        tests | tests/*) here+=("$path") ;;
        --all) all=yes ;;
        *) options+=("$argument") ;;
    esac
done
if [ ${#here[@]} -eq 0 ] && [ ${#simulated[@]} -eq 0 ]; then
    here=(tests)
    ! compgen -G 'tests/sim/test_*.py' >/dev/null || simulated=(tests/sim)
    # Without further options it is the whole suite: a process for each core, and not every case unless asked for.
    if [ ${#options[@]} -eq 0 ]; then
        ! "$python" -c 'import xdist' 2>/dev/null || parallel=(-n "$(nproc)" --dist worksteal)
        [ -n "$all" ] || options=(--fast)
    fi
fi
# Several processes share the cores: waiting threads sleep instead of spinning.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

reports=$(mktemp -d)
beside='' status=0
trap 'rm -rf "$reports"' EXIT
# On an interruption, stop the background process and show its output.
trap '[ -z "$beside" ] || { kill "$beside" 2>/dev/null || true; cat "$reports/simulated.log"; }; exit 130' INT TERM

# run_pytest NAME ARGUMENTS...: replaces the subshell that calls it.
run_pytest() {
    exec "$python" -m pytest --junit-xml "$reports/$1.xml" "${@:2}" ${options[@]+"${options[@]}"}
}

# judge EXIT_CODE: 5 (no test was selected) is judged at the end, over both processes.
judge() { [ "$1" -eq 5 ] || status=$1; }

if [ ${#here[@]} -eq 0 ]; then
    (NUMBA_ENABLE_CUDASIM=1 run_pytest simulated "${simulated[@]}") || judge $?
elif [ ${#simulated[@]} -eq 0 ]; then
    (run_pytest here --ignore=tests/sim "${here[@]}") || judge $?
else
    # The simulator runs one thread at a time and uses one core: it runs in the background, and its output comes last.
    # Each of the two has a pytest cache of its own.
    (NUMBA_ENABLE_CUDASIM=1 run_pytest simulated -o cache_dir=.pytest_cache/simulated "${simulated[@]}") >"$reports/simulated.log" 2>&1 &
    beside=$!
    (run_pytest here --ignore=tests/sim ${parallel[@]+"${parallel[@]}"} "${here[@]}") || judge $?
    wait "$beside" || judge $?
    beside=''
    cat "$reports/simulated.log"
fi

# --- the slowest, and the sum ---------------------------------------------------------------------------------------

"$python" - "$reports" "$status" <<'END'
import sys
from pathlib import Path
from xml.etree import ElementTree

reports, status = Path(sys.argv[1]), int(sys.argv[2])
suites = [suite for report in reports.glob("*.xml") for suite in ElementTree.parse(report).iter("testsuite")]
total, skipped, failures, errors = (
    sum(int(suite.get(key)) for suite in suites) for key in ("tests", "skipped", "failures", "errors")
)
cases = [case for suite in suites for case in suite.iter("testcase")]
print("the ten slowest:")
for case in sorted(cases, key=lambda case: float(case.get("time", 0)), reverse=True)[:10]:
    print(f"{float(case.get('time', 0)):7.1f} s  {case.get('classname')}.{case.get('name')}")
failed = failures + errors
print(f"tests: {total - skipped - failed} passed, {failed} failed, {skipped} skipped")
sys.exit(status or (0 if total else 5))
END
