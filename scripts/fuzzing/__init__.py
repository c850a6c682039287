"""Modules of `scripts/fuzz.py`, which use the tiny models of the tests."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(_ROOT), str(_ROOT / "tests" / "support")) if path not in sys.path]
