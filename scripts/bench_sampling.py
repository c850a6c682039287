"""The time of the sampling kernels on a GPU (arg-max and sampling, one row), by distribution and filter.

    python scripts/bench_sampling.py
    python scripts/bench_sampling.py --vocabularies 128256 --repeats 50
    python scripts/bench_sampling.py --json > after.json                    # --json before.json in another checkout

No model is needed. Both kernels run one after the other in a captured graph, as at the end of a decode step, and the
time is theirs together: the median of the graph's replays, each of 16 draws. "greedy" is the same graph at temperature
0, whose sampling kernel returns at once. Drawn tokens are compared with those of `numba_atomflow.sampling` from the
same logits and seed (exit code 1 if they are not the same).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from number_lists import list_of
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.families import MOST_TOKENS
from numba_atomflow.device.driver import Device, call
from numba_atomflow.device.resources import DeviceResources, Resources
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.host.machine import machine_record
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.runtime.graph import time_launches
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments, argmax_kernel
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.ops.cuda.token.sample import LAYOUT, SampleArguments, sample_kernel
from numba_atomflow.sampling import SamplingParams, candidates, penalise, uniform
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

SEED = 7
CONTEXT = 1000  # tokens that have been seen
FILTERS = {
    "greedy": SamplingParams(temperature=0.0),
    "no filter": SamplingParams(temperature=1.0),
    "top-p 0.95": SamplingParams(temperature=1.0, top_p=0.95),
    "top-k 50": SamplingParams(temperature=1.0, top_k=50),
    "both": SamplingParams(temperature=1.0, top_k=50, top_p=0.95),
    "min-p 0.05": SamplingParams(temperature=1.0, min_p=0.05),
    "top-p, penalty 1.3": SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.3),
}
DISTRIBUTIONS = ("normal", "half normal", "normal x 3", "Zipf", "equal")


def logits_of(distribution: str, vocabulary: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Logits float32 [V]. Normal: flat, as of random weights. Zipf: the n-th likely token's share is about n^-1.5."""
    normal = rng.standard_normal(vocabulary)
    if distribution == "Zipf":
        logits = -1.5 * np.log(rng.permutation(vocabulary) + 1.0) + 0.1 * normal
    else:
        spread = {"normal": 1.0, "half normal": 0.5, "normal x 3": 3.0, "equal": 0.0}[distribution]
        logits = spread * normal
    rounded: NDArray[np.float32] = logits.astype(np.float32)
    return rounded + np.float32(0.0)  # no -0


def expected_token(logits: NDArray[np.float32], params: SamplingParams, draw: int) -> int:
    """The token of `numba_atomflow.sampling`, from logits after the penalty."""
    if params.greedy:
        return int(np.argmax(logits))
    tokens, probabilities = candidates(logits, params)
    index = int(np.searchsorted(np.cumsum(probabilities), uniform(SEED, draw), side="right"))
    return int(tokens[min(index, len(tokens) - 1)])


class Tail:
    """The two kernels with their arrays on the device.

    Args:
        loaded: has both kernels. resources: owns the arrays. stream: of launches.
    """

    def __init__(self, vocabulary: int, loaded: LoadedKernels, ctas: tuple[int, int], resources: Resources) -> None:
        self._resources, self.stream = resources, resources.stream()
        self.seen = np.zeros(-(-vocabulary // 32), np.uint32)
        self._views = {
            "logits": self._array(np.zeros(vocabulary, np.float32)),
            "seen": self._array(self.seen),
            "options": self._array(np.zeros(5)),
            "best": self._array(np.array([LOWEST_KEY], np.int64)),
            "generator": self._array(np.zeros(2, np.uint64)),
            "sums": self._array(np.zeros(LAYOUT.sums_words, np.int64)),
            "token": self._array(np.zeros(1, np.int32)),
        }
        argmax = ArgmaxArguments(*(self._views[name] for name in ArgmaxArguments._fields))
        sample = SampleArguments(*(self._views[name] for name in SampleArguments._fields))
        self.launches = [
            Launch(loaded["argmax"], ctas[0], argmax, self.stream),
            Launch(loaded["sample"], ctas[1], sample, self.stream),
        ]

    def _array(self, values: NDArray[Any]) -> View:
        address = int(self._resources.call("cuMemAlloc", values.nbytes, undo="cuMemFree"))
        call("cuMemcpyHtoD", address, values.ctypes.data, values.nbytes)
        return View("array", address, values.shape, values.dtype.name)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Copy to an array on the device, whose type and shape it has."""
        call("cuStreamSynchronize", self.stream)
        call("cuMemcpyHtoD", self._views[name].address, values.ctypes.data, values.nbytes)
        call("cuCtxSynchronize")  # the stream does not wait for copies

    def token(self) -> int:
        """Run both kernels once; the token."""
        self.write("best", np.array([LOWEST_KEY], np.int64))
        for launch in self.launches:
            launch.run()
        call("cuStreamSynchronize", self.stream)
        token = np.zeros(1, np.int32)
        call("cuMemcpyDtoH", token.ctypes.data, self._views["token"].address, token.nbytes)
        return int(token[0])

    def seconds(self, repeats: int) -> float:
        """Median seconds of both kernels."""
        return len(self.launches) * time_launches(self.launches, self.stream, repeats, self._resources)


def measure(tail: Tail, logits: NDArray[np.float32], seen: NDArray[np.bool_], given: argparse.Namespace) -> list[Any]:
    """A record for each filter: microseconds, and how many of the draws gave the token that was expected."""
    records = []
    tail.write("logits", logits)
    for name, params in FILTERS.items():
        options = [params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty]
        tail.write("options", np.array(options, np.float64))
        tail.write("generator", np.array([SEED, 0], np.uint64))
        after_penalty = penalise(logits, seen, params.repetition_penalty)
        same = sum(tail.token() == expected_token(after_penalty, params, draw) for draw in range(given.draws))
        seconds = tail.seconds(given.repeats)
        records.append({"filter": name, "us": seconds * 1e6, "same_tokens": same, "draws": given.draws})
    return records


def measure_vocabulary(vocabulary: int, device: Device, resources: Resources, given: argparse.Namespace) -> list[Any]:
    """Records of all distributions and filters."""
    chip = chip_of(device)
    records: list[Any] = []
    planned = {
        "argmax": argmax_kernel(vocabulary, chip.sms, chip.dependent_launch),
        "sample": sample_kernel(vocabulary, chip.dependent_launch),
    }
    with resources.scope() as made:
        loaded = LoadedKernels(planned, chip.capability, made)
        tail = Tail(vocabulary, loaded, (planned["argmax"].ctas, planned["sample"].ctas), made)
        for distribution in DISTRIBUTIONS:
            rng = np.random.default_rng(vocabulary)
            logits, seen = logits_of(distribution, vocabulary, rng), np.zeros(vocabulary, np.bool_)
            seen[rng.integers(0, vocabulary, CONTEXT)] = True
            bits = np.packbits(seen, bitorder="little")
            tail.write("seen", np.pad(bits, (0, -len(bits) % 4)).view(np.uint32))
            where = {"vocabulary": vocabulary, "distribution": distribution}
            records += [{**where, **record} for record in measure(tail, logits, seen, given)]
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Microseconds by distribution and filter."""
    rows = []
    for vocabulary, distribution in dict.fromkeys((r["vocabulary"], r["distribution"]) for r in records):
        mine = [r for r in records if (r["vocabulary"], r["distribution"]) == (vocabulary, distribution)]
        cells = [f"{r['us']:.1f}" + ("" if r["same_tokens"] == r["draws"] else " WRONG") for r in mine]
        rows.append([str(vocabulary), distribution, *cells])
    return render("table", ["vocabulary", "distribution", *FILTERS], rows, (0, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table or JSON; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = list_of(int, "49152,128256")
    parser.add_argument("--vocabularies", type=sizes, default=[49152, 128256], metavar="N,N")
    parser.add_argument("--repeats", type=int, default=21, metavar="N", help="replays of each graph")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="tokens that are compared")
    parser.add_argument("--json", action="store_true", help="print a record")
    given = parser.parse_args(arguments)
    if not 2 <= min(given.vocabularies) <= max(given.vocabularies) <= MOST_TOKENS:
        parser.error(f"--vocabularies are from 2 to {MOST_TOKENS}")
    if given.repeats < 1 or given.draws < 1:
        parser.error("--repeats and --draws are 1 or more")
    records: list[dict[str, Any]] = []
    try:
        with DeviceResources() as owner:
            device = owner.open()
            name = device.name
            with owner.current():
                for vocabulary in given.vocabularies:
                    records += measure_vocabulary(vocabulary, device, owner.resources, given)
    except AtomFlowError as error:
        print(f"bench_sampling: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json_text({"device": name, "machine": machine_record(), "records": records}))
    else:
        print(f"{name}: microseconds of arg-max and sampling\n\n{table(records)}", end="")
    return 0 if all(record["same_tokens"] == record["draws"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
