#!/usr/bin/env bash
# Writes requirements-dev.lock: a clean resolve of the project and its extras, with the CPU build of torch (without local
# version labels, so that the lock works with any index). Python: $PYTHON, else python3.11.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --disable-pip-version-check --quiet --dry-run --report "$work/report.json" \
    torch==2.13.0 '.[dev,validate,plot,formats,cu13,serve,serve-test,guided,eval,ray]'

"$work/venv/bin/python" - "$work/report.json" >"$work/lock" <<'END'
import json
import platform
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
packages = sorted(
    (item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"].split("+")[0])
    for item in report["install"]
)
print("# Made by scripts/lock.sh on Python", platform.python_version(), platform.system(), platform.machine())
print("# Use: pip install --constraint requirements-dev.lock -e '.[dev,validate,plot,formats,cu13,serve,serve-test,guided,eval,ray]'")
for name, version in packages:
    if name != "numba-atomflow":
        print(f"{name}=={version}")
END
mv "$work/lock" requirements-dev.lock
