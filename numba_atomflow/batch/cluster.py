"""Ray: a cluster to run on, and the pipeline of shards over a pool of actors.

Scheduling, retries and progress are Ray Data's. Ray's settings that differ from its defaults each have a reason here.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

from numba_atomflow.batch.rows import Row
from numba_atomflow.batch.tasks import EngineOptions, Task
from numba_atomflow.batch.worker import Worker, batch_item
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.files.untrusted import load_json, quote
from numba_atomflow.host.threads import choose_threads, default_threads
from numba_atomflow.utils.arguments import whole_number

LOCAL = "local"
_OBJECT_STORE_BYTES = 200 << 20  # of a local Ray: texts only
_RETRIES = 2  # of a shard whose process died
_PROGRESS = "ray.data._internal.progress.logging_progress"  # the logger of Ray's progress where there is no terminal


@dataclass(frozen=True)
class ActorOptions:
    """Where a batch runs.

    Attributes:
        address: "local" starts a Ray on this machine, and stops it at the end; "auto" finds the Ray that runs here;
            otherwise HOST:PORT of a cluster.
        actors: processes, each with one engine; None: as many as the GPUs or the CPU cores allow.
        quiet: no progress on standard error.
    """

    address: str = LOCAL
    actors: int | None = None
    quiet: bool = False


class Pool(NamedTuple):
    """Actors of a batch.

    Attributes:
        size: how many.
        gpus, cpus: that Ray reserves for each.
        options: how each makes its engine.
    """

    size: int
    gpus: int
    cpus: int
    options: EngineOptions


class ShardResults(NamedTuple):
    """Results of the rows of a shard, in the order in which they ran."""

    number: int
    results: list[dict[str, Any]]


def check_ray() -> None:
    """Check that Ray is installed, without importing it.

    Raises:
        OptionError: it is not.
    """
    for package in ("ray", "pyarrow"):
        if find_spec(package) is None:
            raise OptionError(
                f"Batches need the Python package {package}; install it by pip install 'numba-atomflow[ray]'."
            )


@contextmanager
def connected(options: ActorOptions) -> Iterator[None]:
    """A connection to Ray; a local Ray ends with the context, and the processes of a batch on a cluster do.

    Raises:
        BackendError: there is no Ray at the address, or it does not start.
        OptionError: this process uses Ray already.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
    import ray

    if ray.is_initialized():
        raise OptionError("This process is connected to Ray already; call ray.shutdown() before a batch.")
    try:
        _start_or_connect(options.address)
    except Exception as error:  # Ray raises many kinds
        ray.shutdown()  # what has started of it
        reason = " ".join(str(error).split())
        if options.address == LOCAL:
            raise BackendError(
                f"Ray does not start on this machine ({reason}); try again when fewer programs run."
            ) from error
        raise BackendError(
            f"There is no Ray at {quote(options.address)} ({reason}); start one with `ray start --head`, or take the "
            f"address {LOCAL}."
        ) from error
    # Ray prints on standard output that a process died, until it has ended.
    with _ray_data_settings(options.quiet), redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def _start_or_connect(address: str) -> None:
    """Connect to a Ray, or start one here: a second time if a busy machine started it too slowly."""
    import ray

    local = {"num_cpus": default_threads(), "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    for attempt in (1, 2):
        try:
            ray.init(
                address,
                logging_level=logging.ERROR,
                log_to_driver=False,  # what engines print is not the batch's output
                **(local if address == LOCAL else {}),
            )
        except Exception as error:
            # Ray gives a process of its own 30 s, and then raises `Exception` itself.
            if address != LOCAL or type(error) is not Exception or attempt == 2:
                raise
            ray.shutdown()
        else:
            return


@contextmanager
def _ray_data_settings(quiet: bool) -> Iterator[None]:
    """Ray Data writes its progress to standard error, and nothing else: errors are reported by the batch.

    Settings of the process, which may have pipelines of its own, are what they were when the context ends.
    """
    from ray.data import DataContext

    def is_shown(record: logging.LogRecord) -> bool:
        return record.name == _PROGRESS and not quiet

    context = DataContext.get_current().copy()
    context.enable_progress_bars = not quiet
    context.max_errored_blocks = -1  # a shard whose process died too often does not end the others
    context.execution_no_progress_timeout_s = -1  # a shard of long replies may take hours
    handlers = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    for handler in handlers:
        handler.addFilter(is_shown)
    try:
        with DataContext.current(context):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_shown)


def choose_pool(options: ActorOptions, engine: EngineOptions, shards: int) -> Pool:
    """Actors for the cluster that this process is connected to: one per GPU, or one per share of the CPU cores.

    Raises:
        BackendError: the cluster has no GPU, or not as many GPUs or cores as required.
        OptionError: a number is out of range.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    on_gpu = engine.backend == "cuda" or (engine.backend == "auto" and gpus > 0 and engine.threads is None)
    if on_gpu:
        available, what, per_actor = gpus, "GPUs", 1
        engine = replace(engine, backend="cuda")  # "auto" would take the CPU where a GPU fails
    else:
        if options.address == LOCAL:
            choose_threads(engine.threads)
        per_actor = 1 if engine.threads is None else whole_number("threads", engine.threads)
        engine = replace(engine, backend="cpu", threads=per_actor)
        available, what = cores // max(per_actor, 1), f"shares of {per_actor} CPU cores"
    wanted = available if options.actors is None else whole_number("actors", options.actors)
    if options.actors is not None and wanted < 1:
        raise OptionError(f"actors is {quote(wanted)}; it must be 1 or more.")
    if not 1 <= wanted <= available:
        raise BackendError(
            f"The Ray at {options.address} has {available} {what}, and the batch needs {max(wanted, 1)}."
        )
    return Pool(min(wanted, max(shards, 1)), int(on_gpu), 1 if on_gpu else per_actor, engine)


def run_shards(
    shards: Sequence[tuple[int, Sequence[Row]]], pool: Pool, model: str, fingerprint: str, task: Task
) -> Iterator[ShardResults]:
    """The results of each shard as it ends, in any order. A shard whose process dies again and again is left out.

    Raises:
        BackendError: a process cannot run the model.
    """
    if not shards:
        return
    import ray.data

    items = [batch_item(number, rows) for number, rows in shards]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))  # a block is what Ray runs again
    with warnings.catch_warnings(action="ignore", category=ray.util.annotations.RayDeprecationWarning):
        done = dataset.map_batches(
            Worker,
            batch_size=1,
            batch_format="numpy",
            fn_constructor_args=(model, fingerprint, task, pool.options),
            # A shard takes seconds: an actor that already has the next one would only keep it from an idle actor.
            compute=ray.data.ActorPoolStrategy(size=pool.size, max_tasks_in_flight_per_actor=1),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
    for record in done.iter_rows():
        if record["failure"]:
            raise BackendError(record["failure"])
        yield ShardResults(int(record["number"]), load_json(record["results"]))
