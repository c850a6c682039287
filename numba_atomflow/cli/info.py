"""``numba-atomflow info``: a checkpoint's contents and memory plan, or this machine."""

import json
import math
import os
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow import home
from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError
from numba_atomflow.host import machine

if TYPE_CHECKING:
    from numba_atomflow.checkpoint.format import Checkpoint

EXAMPLES = """\b
Examples:
  numba-atomflow info                                  this machine and its versions
  numba-atomflow info smollm2-135m-instruct            geometry, sizes, memory plan
  numba-atomflow info my-model.safetensors --verify    read every weight
  numba-atomflow info my-model.safetensors --max-seq-len 2048 --backend cuda --json
  numba-atomflow info my-model.safetensors --gpus 4    the memory plan of each of four GPUs
  numba-atomflow info large.safetensors --draft small.safetensors
"""

Table = list[tuple[str, str]]


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP}  [default: none, shows this machine]"),
    ] = None,
    max_seq_len: options.MaxSeqLen = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every weight.")] = False,
    backend: options.Backend = options.BackendChoice.AUTO,
    gpus: options.Gpus = "1",
    draft: options.Draft = None,
    as_json: options.Json = False,
) -> None:
    """Show a checkpoint, or this machine.

    Of a checkpoint: geometry, sizes and memory plan. Without MODEL: this machine and its versions.
    """
    if model is None:
        given = {
            "--verify": verify,
            "--max-seq-len": max_seq_len,
            "--backend": backend != "auto",
            "--gpus": gpus != "1",
            "--draft": draft is not None,
        }
        for option in (name for name, value in given.items() if value):
            raise OptionError(f"{option} needs a model; name a checkpoint.")
        _show(_machine(), as_json, _machine_table)
        return

    if draft is not None and gpus != "1":
        raise OptionError("--draft is for one GPU; leave it out, or use --gpus 1.")

    from numba_atomflow.checkpoint.find import find_checkpoint
    from numba_atomflow.checkpoint.format import Checkpoint

    with Checkpoint.open(find_checkpoint(model)) as checkpoint:
        if verify:
            checkpoint.verify()
        record = _model(checkpoint, max_seq_len, verify, backend, gpus)
        if draft is not None:
            record["draft"] = _draft(checkpoint, draft, record["memory_plan"]["max_seq_len"], backend, gpus)
        _show(record, as_json, _model_table)


def _show(record: dict[str, Any], as_json: bool, table: Any) -> None:
    if as_json:
        output.emit_json(record)
        return
    rows: Table = table(record)
    width = max(len(name) for name, _ in rows) + 2
    output.emit(
        "".join(f"{output.one_line(name):<{width}}{output.one_line(value)}".rstrip() + "\n" for name, value in rows)
    )


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def _model(
    checkpoint: "Checkpoint", max_seq_len: int | None, verified: bool, backend: options.BackendChoice, gpus: str
) -> dict[str, Any]:
    geometry = checkpoint.geometry
    return {
        "path": str(checkpoint.path),
        "file_bytes": checkpoint.path.stat().st_size,
        "parameters": geometry.parameter_count(),
        "geometry": geometry.to_dict(),
        "head": checkpoint.head,
        "quantiser": json.loads(checkpoint.metadata.get("quantiser", "{}")),
        "source": json.loads(checkpoint.metadata.get("source", "{}")),
        "text": {
            "tokenizer": checkpoint.text.tokenizer_json is not None,
            "chat_template": checkpoint.text.chat_template is not None,
            "eos_ids": list(checkpoint.text.eos_ids),
        },
        "verified": verified,
        "memory_plan": _memory_plan(checkpoint, max_seq_len, backend, gpus),
    }


def _draft(
    checkpoint: "Checkpoint", draft: str, max_seq_len: int, backend: options.BackendChoice, gpus: str
) -> dict[str, Any]:
    """A draft model of the checkpoint, and its memory plan.

    Raises:
        OptionError: it has other tokens.
    """
    from numba_atomflow.checkpoint.find import find_checkpoint
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.engine.drafts import check_same_tokens

    with Checkpoint.open(find_checkpoint(draft, "draft")) as smaller:
        check_same_tokens(checkpoint, smaller)
        positions = min(max_seq_len, smaller.geometry.max_positions)
        return {
            "path": str(smaller.path),
            "parameters": smaller.geometry.parameter_count(),
            "memory_plan": _memory_plan(smaller, positions, backend, gpus),
        }


def _memory_plan(
    checkpoint: "Checkpoint", max_seq_len: int | None, backend: options.BackendChoice, gpus: str
) -> dict[str, Any]:
    """What loading would allocate: on the CPU the weights stay in the mapped file, on a GPU they are copied; with
    several GPUs, on each of them.
    """
    from numba_atomflow.backends.choose import BackendChoice, gpu_is_usable
    from numba_atomflow.context import choose_max_seq_len

    positions = choose_max_seq_len(checkpoint.geometry, max_seq_len)
    mapped: dict[str, int] = {}
    count = BackendChoice(backend.value, gpus=options.gpus_of(gpus)).gpu_count
    if count > 1:
        from numba_atomflow.backends.cuda.tensor_parallel.plan import plan_for_gpus

        name = "cuda"
        plan, device = plan_for_gpus(checkpoint.geometry, checkpoint.head, positions, count)
    elif backend == "cuda" or (backend == "auto" and gpu_is_usable()):
        from numba_atomflow.backends.cuda.plan import plan_for_this_gpu

        name = "cuda"
        plan, device = plan_for_this_gpu(checkpoint.geometry, checkpoint.head, positions)
    else:
        from numba_atomflow.backends.cpu import cpu_plan
        from numba_atomflow.host.threads import choose_threads

        name, mapped, device = "cpu", {"weights": checkpoint.payload_bytes}, {}
        plan = cpu_plan(checkpoint.geometry, positions, choose_threads(None))
    return {
        "backend": name,
        "max_seq_len": positions,
        "mapped_bytes": mapped,
        "allocated_bytes": {pool: count for pool, count in plan.pool_bytes().items() if pool not in mapped},
        "allocated_total": plan.total,
        "device": device,
        "gpus": count if name == "cuda" else 0,
        "buffers": [
            {"pool": b.pool, "name": b.name, "shape": list(b.shape), "dtype": b.dtype, "bytes": b.nbytes}
            for b in plan.buffers
        ],
    }


def _model_table(record: dict[str, Any]) -> Table:
    g, text, plan = record["geometry"], record["text"], record["memory_plan"]
    bits = record["file_bytes"] * 8 / record["parameters"]
    scaling = g["rope_scaling"]
    rope = f"theta {g['rope_theta']:g}" + (f", {scaling['kind']} scaling by {scaling['factor']:g}" if scaling else "")
    source, quantiser = record["source"], record["quantiser"]
    return [
        ("checkpoint", record["path"]),
        ("file", f"{output.size(record['file_bytes'])}, {bits:.2f} bits per parameter"),
        (
            "verified",
            "every weight was read and is sound" if record["verified"] else "header only (--verify reads all)",
        ),
        ("parameters", f"{record['parameters']:,}"),
        ("layers", f"{g['layers']}"),
        ("hidden, intermediate", f"{g['hidden']}, {g['ffn']}"),
        ("heads", f"{g['heads']} of {g['head_dim']}, {g['kv_heads']} for keys and values{_extras(g)}"),
        ("vocabulary", f"{g['vocabulary']:,} tokens, {'tied' if g['tied_embeddings'] else 'untied'} embeddings"),
        ("LM head", record["head"]),
        ("positions", f"at most {g['max_positions']:,}"),
        ("RoPE", rope),
        ("text", f"tokenizer {_yes(text['tokenizer'])}, chat template {_yes(text['chat_template'])}"),
        ("quantiser", ", ".join(f"{key} {value}" for key, value in quantiser.items())),
        ("source", f"{source.get('path', 'unknown')} ({source.get('kind', 'unknown')})"),
        *(("  SHA-256", f"{digest}  {name}") for name, digest in source.get("sha256", {}).items()),
        ("", ""),
        *_plan_table("memory plan", plan, " (--max-seq-len)"),
        *_paths(plan),
        *_draft_table(record),
    ]


def _plan_table(title: str, plan: dict[str, Any], note: str = "") -> Table:
    return [
        (title, f"{plan['backend']} backend, {plan['max_seq_len']:,} positions{note}"),
        *(
            (f"  {pool}", f"{output.size(count):>10}  mapped from the file")
            for pool, count in plan["mapped_bytes"].items()
        ),
        *((f"  {pool}", f"{output.size(count):>10}") for pool, count in plan["allocated_bytes"].items()),
        ("  allocated", f"{output.size(plan['allocated_total']):>10}  {_of_device(plan)}"),
    ]


def _draft_table(record: dict[str, Any]) -> Table:
    """The memory plan of the draft model, and of both."""
    draft = record.get("draft")
    if draft is None:
        return []
    both = record["memory_plan"]["allocated_total"] + draft["memory_plan"]["allocated_total"]
    return [
        ("", ""),
        ("draft model", f"{draft['path']}, {draft['parameters']:,} parameters"),
        *_plan_table("its memory plan", draft["memory_plan"]),
        ("both allocated", f"{output.size(both):>10}"),
    ]


def _extras(geometry: dict[str, Any]) -> str:
    """Attention's parameters beyond those of Llama."""
    return (", biases" if geometry["qkv_bias"] else "") + (", norms of q and k" if geometry["qk_norm"] else "")


def _of_device(plan: dict[str, Any]) -> str:
    device = plan["device"]
    if not device:
        return "without the weights"
    free, total = output.size(device["free_bytes"]), output.size(device["memory_bytes"])
    each = f" on each of {plan['gpus']} GPUs" if plan["gpus"] > 1 else ""
    return f"in one allocation{each}; {device['name']} has {free} free of {total}"


def _paths(plan: dict[str, Any]) -> Table:
    """How this GPU would run decode steps and prompts."""
    from numba_atomflow.backends.base import DecodePath, PrefillPath

    device = plan["device"]
    if not device:
        return []
    return [("decode", str(DecodePath(**device["decode"]))), ("prefill", str(PrefillPath(**device["prefill"])))]


def _yes(present: bool) -> str:
    return "yes" if present else "none"


# --- this machine ----------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    from llvmlite import binding

    from numba_atomflow.host.cpu_quota import cpu_quota
    from numba_atomflow.host.pool import is_available
    from numba_atomflow.host.threads import default_threads

    return {
        "versions": machine.versions(),
        "cpu": {"name": machine.cpu_name(), "llvm_name": binding.get_host_cpu_name(), "cores": os.cpu_count()},
        "threads": default_threads(),
        "cpu_quota": cpu_quota(),
        "own_thread_pool": is_available(),
        "threading_layers": _threading_layers(),
        "memory_bytes": math.prod(os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES")),
        "cuda_driver": machine.cuda_driver(),
        "home": str(home.home()),
        "models": sorted(path.stem for path in home.models().glob("*.safetensors")),
    }


def _machine_table(record: dict[str, Any]) -> Table:
    cpu, layers = record["cpu"], record["threading_layers"]
    own, is_slow = record["own_thread_pool"], "omp" not in layers
    advice = " (omp is missing: install libgomp, decoding is slow without)" if is_slow and not own else ""
    return [
        *((name, version or "not installed") for name, version in record["versions"].items()),
        ("CPU", f"{cpu['name']} ({cpu['llvm_name']}), {cpu['cores']} cores"),
        ("memory", output.size(record["memory_bytes"])),
        ("threads", _threads(record["threads"], record["cpu_quota"])),
        ("thread pool", "own" if own else "numba's: " + ", ".join(layers) + advice),
        ("CUDA driver", record["cuda_driver"] or "none"),
        ("home", record["home"]),
        ("models", ", ".join(record["models"]) or "none yet"),
    ]


def _threads(count: int, quota: float | None) -> str:
    return str(count) + ("" if quota is None else f" (CPU quota of {quota:g})")


def _threading_layers() -> list[str]:
    """numba's threading layers that can be loaded here, in the kernels' order of preference."""
    found = []
    for name, module in (("omp", "omppool"), ("tbb", "tbbpool"), ("workqueue", "workqueue")):
        try:
            import_module(f"numba.np.ufunc.{module}")
        except ImportError:
            continue
        found.append(name)
    return found
