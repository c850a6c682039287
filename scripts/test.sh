#!/usr/bin/env bash
# The whole test suite that this machine can run; what it cannot run is skipped with a reason.
# Arguments go to pytest: bash scripts/test.sh -k tokenizer, bash scripts/test.sh tests/cpu/test_fp8.py.
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
options=() here=() simulated=()
for argument in "$@"; do
    path=${argument#"$PWD"/}
    path=${path#"$(pwd -P)"/} # where a symlink leads here, either name may be given
    path=${path#./}
    case $path in
        tests/sim | tests/sim/*) simulated+=("$path") ;;
        tests | tests/*) here+=("$path") ;;
        *) options+=("$argument") ;;
    esac
done
if [ ${#here[@]} -eq 0 ] && [ ${#simulated[@]} -eq 0 ]; then
    here=(tests)
    ! compgen -G 'tests/sim/test_*.py' >/dev/null || simulated=(tests/sim)
fi

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
status=0

# run_pytest NAME ARGUMENTS...: exit code 5 (no test was selected) is judged at the end, over both processes.
run_pytest() {
    local name=$1 code=0
    shift
    "$python" -m pytest --junit-xml "$reports/$name.xml" "$@" ${options[@]+"${options[@]}"} || code=$?
    [ $code -eq 0 ] || [ $code -eq 5 ] || status=$code
}

[ ${#here[@]} -eq 0 ] || run_pytest here --ignore=tests/sim "${here[@]}"
[ ${#simulated[@]} -eq 0 ] || NUMBA_ENABLE_CUDASIM=1 run_pytest simulated "${simulated[@]}"

# --- the sum --------------------------------------------------------------------------------------------------------

"$python" - "$reports" "$status" <<'END'
import sys
from pathlib import Path
from xml.etree import ElementTree

reports, status = Path(sys.argv[1]), int(sys.argv[2])
suites = [suite for report in reports.glob("*.xml") for suite in ElementTree.parse(report).iter("testsuite")]
total, skipped, failures, errors = (
    sum(int(suite.get(key)) for suite in suites) for key in ("tests", "skipped", "failures", "errors")
)
failed = failures + errors
print(f"tests: {total - skipped - failed} passed, {failed} failed, {skipped} skipped")
sys.exit(status or (0 if total else 5))
END
