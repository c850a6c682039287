"""``numba-atomflow validate --diff-gpus``: several GPUs that share a model against one."""

from collections.abc import Sequence

from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError


def check_several_gpus(engine_options: options.EngineOptions) -> None:
    """Raises:
    OptionError: the model is not on several GPUs, or options are given that are not for several.
    """
    from numba_atomflow.backends.choose import BackendChoice

    given = engine_options
    choice = BackendChoice(
        given.backend.value,
        given.threads,
        given.decode.value,
        prefill=given.prefill.value,
        prefill_chunk=given.prefill_chunk,
        gpus=options.gpus_of(given.gpus),
    )
    if choice.gpu_count < 2:
        raise OptionError("--diff-gpus compares several GPUs with one; give --gpus N, from 2 on.")


def show_diff_gpus(
    model: str, prompt: Sequence[int], decode_steps: int, engine_options: options.EngineOptions, *, as_json: bool
) -> bool:
    """Run the prompt on one GPU, then on several, and show the result; returns whether the bits are the same."""
    from numba_atomflow.validate import compare_gpus, record_steps

    runs = []
    for how in (engine_options.on_one_gpu(), engine_options):
        with how.load(model, len(prompt) + decode_steps) as engine, output.steps_bar() as progress:
            runs.append(record_steps(engine.backend, engine.geometry, prompt, decode_steps, progress))
    report = compare_gpus(*runs)
    if as_json:
        output.emit_json(report.to_dict())
    else:
        output.emit(f"{report.backend} against {report.reference}: {report.prompt_tokens} prompt tokens, ")
        output.emit(f"{decode_steps} decode steps\n{report.verdict()}\n")
    return report.passed
