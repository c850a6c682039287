"""A process that measures cases, and is watched: a new kernel may hang, or leave a GPU context that is lost.

Requests are lines of JSON, a `Case` each; so are the answers: {"measured": ..., "failure": ..., "lost": ...}.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from prefill_bench.cases import Case, Measured

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent
MODULE = "prefill_bench.worker"
_LONGEST_FAILURE = 300  # characters


@dataclass(frozen=True)
class Answer:
    """What came of a case.

    Attributes:
        measured: None if it failed.
        failure: why, in one line.
        lost: the process cannot go on: it hangs, has ended, or has lost its GPU context.
    """

    measured: Measured | None
    failure: str = ""
    lost: bool = False


class Measurer(Protocol):
    """Where cases are measured."""

    def measure(self, case: Case, limit: float) -> Answer: ...
    def close(self) -> None: ...


class Worker:
    """The process, as its parent sees it. It is started for the first case, after it was lost, and for another lab.

    Args:
        log: file that its messages are appended to.
        command: that starts it.
    """

    def __init__(self, log: Path, command: tuple[str, ...] = (sys.executable, "-m", MODULE)) -> None:
        self._log, self._command = log, command
        self._process: subprocess.Popen[str] | None = None
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader: threading.Thread | None = None
        self._lab = ""

    def measure(self, case: Case, limit: float) -> Answer:
        """Measure a case; after `limit` seconds the process is killed."""
        if case.lab != self._lab:
            self.close()
        self._lab = case.lab
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(case.to_dict()) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=limit)
        except Empty:
            self.close()
            return Answer(None, f"no answer within {limit:.0f} s", lost=True)
        except OSError:
            line = ""
        if not line:
            code = process.wait()
            self.close()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Answer(None, f"its process {how}; see {self._log}", lost=True)
        record = json.loads(line)
        measured = record["measured"]
        answer = Answer(measured and Measured.from_dict(measured), record["failure"], record["lost"])
        if answer.lost:
            self.close()
        return answer

    def close(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._reader:
            self._reader.join()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not sent to a process that has ended
                if pipe:
                    pipe.close()

    def _start(self) -> "subprocess.Popen[str]":
        paths = [str(SCRIPTS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("a") as log:
            process = subprocess.Popen(
                self._command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._lines = lines = SimpleQueue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put("")  # it has ended

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        self._process = process
        return process


# --- the process itself ----------------------------------------------------------------------------------------------


def serve(measure: Callable[[Case], Measured], requests: Any, answers: Any) -> None:
    """Answer every request. After an error of the GPU the context is lost: the process ends."""
    for line in requests:
        case, measured, failure, lost = Case(**json.loads(line)), None, "", False
        started = time.perf_counter()
        try:
            measured = asdict(measure(case))
        except Exception as error:
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_FAILURE]
            lost = is_device_error(error)
            print(f"{case.text}: {failure}", file=sys.stderr)
            if not lost:
                sys.excepthook(type(error), error, error.__traceback__)
        print(f"{case.text}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        answers.write(json.dumps({"measured": measured, "failure": failure, "lost": lost}) + "\n")
        answers.flush()
        if lost:
            return


def is_device_error(error: BaseException) -> bool:
    """Whether a GPU call failed, after which nothing else works in this process."""
    return type(error).__name__ in ("DriverError", "AcceleratorError", "CUDAError") or "CUDA error" in str(error)


def open_lab(name: str) -> Any:
    """What measures the cases of a lab; torch, or our engine, is imported only where it is used."""
    match name:
        case "kernels":
            from prefill_bench.kernels import KernelLab

            return KernelLab()
        case "engine":
            from prefill_bench.engines import EngineLab

            return EngineLab()
        case "peer":
            from prefill_bench.peer import PeerLab

            return PeerLab()
    raise ValueError(f"there is no lab {name}")


def main() -> int:
    """Serve until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with answers
    lab = cache(open_lab)
    serve(lambda case: lab(case.lab).measure(case), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
