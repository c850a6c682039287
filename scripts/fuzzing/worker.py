"""A process that uses damaged files, one after the other, and is watched: it may be ended by a signal, or hang.

Requests and replies are lines of JSON: {"target", "folder"} -> {"kind", "signature", "detail"}.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULE = "fuzzing.worker"
MEMORY = 3 << 30  # bytes beyond what the process has when it is ready; the models are of 200 kB
LONGEST_MESSAGE = 700  # characters of an error's sentence, without those of its paths
_READY = 120  # seconds to start, to load the kernels or to compile them
_MOST_LIMITS = 8  # wall time, as a multiple of the CPU time limit, for a process that got no CPU time


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        kind: "ok", "refused" (an AtomFlowError), or a finding: "exception", "sentence" (an error whose message is no
            sentence), "signal", "hang".
        signature: equal for findings of the same origin; of a refusal, the class.
        detail: the message or the traceback.
    """

    kind: str
    signature: str = ""
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("ok", "refused")


class Worker:
    """The process, as its parent sees it; it is started for the first request, and again after it has ended."""

    def __init__(self, fixtures: Path, limit: float) -> None:
        self._fixtures, self._limit = fixtures, limit
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, target: str, folder: Path) -> Outcome:
        """Use a folder of files."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"target": target, "folder": str(folder)}).encode() + b"\n")
        process.stdin.flush()
        answer = self._answer(self._limit)
        if answer is not None:
            return Outcome(**answer)
        ended = process.poll()
        self.close()
        if ended is None:
            return Outcome("hang", f"{target}: hang", f"no answer within {self._limit} s")
        name = signal.Signals(-ended).name if ended < 0 else f"exit code {ended}"
        return Outcome("signal", f"{target}: {name}", f"the process ended by {name}")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        path = [
            str(ROOT / "scripts"),
            str(ROOT / "tests" / "support"),
            str(ROOT),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(self._fixtures)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONFAULTHANDLER": ""},
            start_new_session=True,  # Ctrl-C is for the parent, which ends this process
        )
        if self._answer(_READY) is None:
            self.close()
            raise RuntimeError("The worker did not start; try `python -m fuzzing.worker` in scripts/.")
        return self._process

    def _answer(self, limit: float) -> dict[str, str] | None:
        """The next line; None if the process has ended, or works for longer than `limit` seconds."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        used, until = _cpu_seconds(process.pid), time.monotonic() + _MOST_LIMITS * limit
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while time.monotonic() < until:
                if selector.select(limit):
                    line = process.stdout.readline()
                    if not line:
                        process.wait()
                        return None
                    answer: dict[str, str] = json.loads(line)
                    return answer
                if _cpu_seconds(process.pid) - used > limit / 2:
                    return None
        return None


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


# --- in the process ------------------------------------------------------------------------------------------------


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdout = sys.stderr
    fixtures = Path(sys.argv[1])
    warnings.simplefilter("error", RuntimeWarning)  # NumPy's: an overflow, a NaN
    from fuzzing import targets
    from numba_atomflow.text import template_process

    held = template_process.shared_process()  # otherwise each case starts one
    targets.USES["checkpoint"](fixtures, fixtures)  # loads the kernels
    limit_memory()
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        outcome = use(targets.USES[case["target"]], case["target"], Path(case["folder"]), fixtures)
        print(json.dumps(asdict(outcome)), file=answers, flush=True)
    del held


def limit_memory() -> None:
    """From here on, this process may take `MEMORY` bytes of address space more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def use(function: object, target: str, folder: Path, fixtures: Path) -> Outcome:
    """Call a function of `targets.USES`."""
    from numba_atomflow.errors import AtomFlowError

    try:
        assert callable(function)
        function(folder, fixtures)
    except AtomFlowError as error:
        return _judged(target, error, folder, fixtures)
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return Outcome(
            "exception", f"{target}: {type(error).__name__} {_origin(error)}", traceback.format_exc()[-4000:]
        )
    return Outcome("ok")


def _judged(target: str, error: Exception, folder: Path, fixtures: Path) -> Outcome:
    """Whether an error's message is one short sentence without control characters."""
    from numba_atomflow.files.untrusted import escape_controls

    message, kind = str(error), type(error).__name__
    bare = message.replace(str(folder), "").replace(str(fixtures), "")
    faults = [
        name
        for name, there in (
            ("several lines", "\n" in message or "\r" in message),
            ("control characters", escape_controls(message) != message),
            ("too long", len(bare) > LONGEST_MESSAGE),
            ("no end", not message.rstrip().endswith((".", ":", ")", "!", "?"))),
        )
        if there
    ]
    if not faults:
        return Outcome("refused", kind, message)
    return Outcome("sentence", f"{target}: {kind} {', '.join(faults)} {_origin(error)}", message[:2000])


def _origin(error: BaseException) -> str:
    """The innermost function of this project."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "numba_atomflow" in frame.filename or "/fuzzing/" in frame.filename] or frames
    found = next((frame for frame in reversed(ours) if "/fuzzing/worker" not in frame.filename), frames[-1])
    return f"in {Path(found.filename).name} {found.name}"


if __name__ == "__main__":
    main()
