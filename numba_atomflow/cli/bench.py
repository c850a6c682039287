"""``numba-atomflow bench``: prompt and decode speed at several depths, as a share of achievable bandwidth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow.cli import options, output
from numba_atomflow.cli.model_choice import ChosenModel, ModelChoice
from numba_atomflow.cli.report import Format, ReportOptions, headline
from numba_atomflow.errors import OptionError
from numba_atomflow.utils.tables import render

if TYPE_CHECKING:
    from numba_atomflow.perf.bench import BenchReport, DepthResult
    from numba_atomflow.utils.stats import Spread

EXAMPLES = """\b
Examples:
  numba-atomflow bench                                          the default model
  numba-atomflow bench my-model.safetensors --depths 0,2048,8192
  numba-atomflow bench --geometry llama-3.2-3b --random-weights --format md
  numba-atomflow bench --format json > before.json
  numba-atomflow bench --compare before.json
  numba-atomflow bench --backend cuda --decode graph            a CUDA graph instead of the persistent kernel
  numba-atomflow bench --workload prompts.jsonl                 real text, with and without speculation
  numba-atomflow bench large.safetensors --draft small.safetensors --workload prompts.jsonl

\b
Every figure is a median, with the 10th and 90th percentile in brackets.
GB/s: weights and KV cache read per token, over TPOT. "of loads", "of TMA", "of memory read": that speed as a share of
the achievable bandwidth, which the same run measures by loads and by TMA bulk copies (GPU), or by reading (CPU).
"""


def bench(
    *,
    model: ModelChoice,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", "-n", metavar="N", help="Tokens to generate.")] = 128,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", metavar="N", help="Tokens of a prompt.")] = 512,
    depths: Annotated[
        str, typer.Option("--depths", "-d", metavar="A,B,...", help="Tokens in the KV cache before each turn.")
    ] = "0",
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", help="Turns to take medians of.")] = 5,
    compile_times: Annotated[
        bool,
        typer.Option(
            "--compile-times/--no-compile-times",
            help="Also measure a cold and a warm start, with a compile cache of their own.",
        ),
    ] = True,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="FILE", help="Also show ratios to an earlier --json report.")
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(
            "--workload",
            metavar="FILE",
            help='Instead: decode the prompts of FILE, with and without speculation in turns; a line {"prompt": "..."} '
            'for each, with "chat": true for a message to answer.',
        ),
    ] = None,
    draft: options.Draft = None,
    engine_options: options.EngineOptions,
    report_options: ReportOptions,
) -> None:
    """Measure prompt and decode speed.

    Also TTFT, TPOT and the share of achievable memory bandwidth, at several depths of context.
    """
    chosen_model = model.find()
    if workload is not None:
        if model.geometry is not None or compare is not None or depths != "0" or prompt_tokens != 512:
            raise OptionError(
                "--workload takes neither --geometry, --compare, --depths nor --prompt-tokens; leave them out."
            )
        _bench_workload(chosen_model, workload, decode_tokens, repeats, draft, engine_options, report_options.format)
        return
    if draft is not None:
        raise OptionError("--draft needs real text, which random tokens are not; give --workload FILE as well.")

    from numba_atomflow.perf import bench as benchmark

    settings = benchmark.Settings(prompt_tokens, decode_tokens, parse_depths(depths), repeats)
    positions = settings.positions(chosen_model.geometry)
    earlier = None if compare is None else benchmark.read_report(compare)
    if earlier is not None:
        benchmark.check_comparable(earlier, chosen_model.geometry, settings)
    times = None
    if compile_times:
        from numba_atomflow.perf.compile_times import measure_compile_times

        with output.steps_bar() as progress:
            times = measure_compile_times(
                chosen_model.source,
                engine_options.backend.value,
                positions,
                engine_options.threads,
                progress,
                decode=engine_options.decode.value,
                prefill=engine_options.prefill.value,
                prefill_chunk=engine_options.prefill_chunk,
            )
    with chosen_model.open(engine_options, positions) as engine, output.steps_bar() as progress:
        report = benchmark.bench(engine, settings, times, progress)
    show(report, earlier, report_options.format)


def _bench_workload(
    model: ChosenModel,
    path: Path,
    decode_tokens: int,
    repeats: int,
    draft: str | None,
    engine_options: options.EngineOptions,
    form: Format,
) -> None:
    """Measure and print the workload of a file."""
    from numba_atomflow.cli import workload_report
    from numba_atomflow.context import choose_max_seq_len
    from numba_atomflow.perf.workload import measure_workload, read_workload

    prompts = read_workload(path)
    positions = choose_max_seq_len(model.geometry, None)
    with model.open(engine_options, positions, draft) as engine, output.steps_bar() as progress:
        report = measure_workload(engine, path, prompts, decode_tokens, repeats, progress)
    workload_report.show(report, form)


def parse_depths(text: str) -> tuple[int, ...]:
    """``0,2048`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--depths {text} is no list of numbers; give for example --depths 0,2048.") from error


# --- output ----------------------------------------------------------------------------------------------------------


def show(report: "BenchReport", earlier: "BenchReport | None", form: Format) -> None:
    """Print a report, and its ratios to an earlier one."""
    match form:
        case Format.JSON:
            output.emit_json(
                report.to_dict() | ({} if earlier is None else {"comparison": _comparison(report, earlier)})
            )
        case Format.CSV:
            output.emit(_csv(report, earlier))
        case _:
            bullet = "- " if form is Format.MD else ""
            output.emit("".join(f"{bullet}{line}\n" for line in _headline(report)) + "\n" + _table(report, form))
            if earlier is not None:
                output.emit("\n" + _ratios(report, earlier, form, bullet))


def _headline(report: "BenchReport") -> list[str]:
    """Everything that is the same at all depths, a line each."""
    settings = report.settings
    return [
        *headline(report),
        *([] if report.prefill is None else [f"prefill: {report.prefill}"]),
        f"each of {settings.repeats} turns: a prompt of {settings.prompt_tokens}, then {settings.decode_tokens} tokens",
    ]


def _table(report: "BenchReport", form: Format) -> str:
    headers = [
        "depth",
        "prompt tok/s",
        "TTFT ms",
        "decode tok/s",
        "TPOT ms",
        "GB/s",
        *(f"of {name}" for name in report.ceilings),
        "cold compile s",
        "warm compile s",
    ]
    times = report.compile_times
    compiling = ["-", "-"] if times is None else [f"{times.cold:.1f}", f"{times.warm:.1f}"]

    def row(result: "DepthResult") -> list[str]:
        speed = result.gigabytes_per_second
        return [
            str(result.depth),
            result.prompt_speed.text(0),
            result.ttft.text(1, 1e3),
            result.decode_speed.text(1),
            result.tpot.text(3, 1e3),
            f"{speed:.1f}",
            *(f"{speed / ceiling:.0%}" for ceiling in report.ceilings.values()),
            *compiling,
        ]

    return render("md" if form is Format.MD else "table", headers, [row(result) for result in report.results])


def _comparison(report: "BenchReport", earlier: "BenchReport") -> dict[str, Any]:
    from numba_atomflow.perf.bench import compare, differences

    return {
        "earlier": {"date": earlier.date, "commit": earlier.machine.get("commit")},
        "ratios": [
            {"depth": ratio.depth, "prompt": ratio.prompt_speed.to_dict(), "decode": ratio.decode_speed.to_dict()}
            for ratio in compare(report, earlier)
        ],
        "differences": {
            name: {"earlier": then, "now": now} for name, (then, now) in differences(report, earlier).items()
        },
    }


def _ratios(report: "BenchReport", earlier: "BenchReport", form: Format, bullet: str) -> str:
    from numba_atomflow.perf.bench import compare, differences

    rows = [
        [str(ratio.depth), ratio.prompt_speed.text(3), ratio.decode_speed.text(3)] for ratio in compare(report, earlier)
    ]
    table = render("md" if form is Format.MD else "table", ["depth", "prompt speed", "decode speed"], rows)
    changed = [f"{bullet}{name}: {then} -> {now}\n" for name, (then, now) in differences(report, earlier).items()]
    return f"As multiples of {earlier.date} (above 1: faster now)\n\n{table}" + (
        "\n" + "".join(changed) if changed else ""
    )


def _csv(report: "BenchReport", earlier: "BenchReport | None") -> str:
    """One row per depth with all facts of the run, for spreadsheets that collect many runs."""
    from numba_atomflow.perf.bench import compare

    machine, settings, times = report.machine, report.settings, report.compile_times
    ratios = {} if earlier is None else {ratio.depth: ratio for ratio in compare(report, earlier)}
    records: list[dict[str, Any]] = []
    for result in report.results:
        record = {
            "model": report.model,
            "random_weights": report.random_weights,
            "backend": report.backend,
            "device": report.device,
            "decode": report.decode and report.decode.name,
            "prefill": report.prefill and report.prefill.name,
            "nvidia_driver": machine["nvidia_driver"],
            "commit": machine["commit"],
            "date": report.date,
            "depth": result.depth,
            "prompt_tokens": settings.prompt_tokens,
            "decode_tokens": settings.decode_tokens,
            "repeats": settings.repeats,
            **_columns("prompt_tokens_per_second", result.prompt_speed),
            **_columns("ttft_seconds", result.ttft),
            **_columns("decode_tokens_per_second", result.decode_speed),
            **_columns("tpot_seconds", result.tpot),
            "bytes_per_token": result.bytes_per_token,
            "gigabytes_per_second": result.gigabytes_per_second,
            **{f"ceiling {name}": ceiling for name, ceiling in report.ceilings.items()},
            "cold_compile_seconds": times and times.cold,
            "warm_compile_seconds": times and times.warm,
        }
        if earlier is not None:
            ratio = ratios.get(result.depth)
            record |= _columns("prompt_ratio", ratio.prompt_speed if ratio else None)
            record |= _columns("decode_ratio", ratio.decode_speed if ratio else None)
        records.append(record)
    rows = [["" if value is None else str(value) for value in record.values()] for record in records]
    return render("csv", list(records[0]), rows)


def _columns(name: str, spread: "Spread | None") -> dict[str, float | None]:
    median, low, high = (spread.median, spread.low, spread.high) if spread else (None, None, None)
    return {name: median, f"{name}_low": low, f"{name}_high": high}
