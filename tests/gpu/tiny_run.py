"""Prompts and generations of a tiny model, greedy and sampled, with graphs and without: run by compute-sanitizer.

python tests/gpu/tiny_run.py          # decode steps in the persistent kernel, too
python tests/gpu/tiny_run.py graph    # without: under racecheck, CTAs that poll for each other take minutes
"""

from pathlib import Path
from sys import argv, path

path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

from tiny_models import tiny_geometry  # noqa: E402

from numba_atomflow import Engine, SamplingParams  # noqa: E402
from numba_atomflow.backends.cuda.backend import CudaBackend  # noqa: E402
from numba_atomflow.checkpoint.arrays import WeightArrays  # noqa: E402
from numba_atomflow.checkpoint.random_weights import RandomModel  # noqa: E402

SAMPLINGS = (SamplingParams(max_tokens=6), SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, seed=1))
QWEN = {"qk_norm": True, "qkv_bias": True}
# Geometry, --decode (auto: persistent, if it can), --prefill.
FAMILIES = (
    ({}, "graph", "gemv"),
    ({}, "auto", "gemv"),
    (QWEN, "graph", "gemv"),
    ({}, "auto", "gemm"),
    (QWEN, "auto", "gemm"),
)
CHUNK = 256  # of the GEMM path: a prompt is a chunk and a short one


def main() -> None:
    for family, chosen, prefill in FAMILIES:
        decode = argv[1] if len(argv) > 1 else chosen
        for graphs in (True, False):
            model = RandomModel(tiny_geometry(**family))
            options = {"graphs": graphs, "decode": decode, "prefill": prefill}
            options |= {"prefill_chunk": CHUNK} if prefill == "gemm" else {}
            backend = CudaBackend(model.geometry, WeightArrays(model), 300, **options)
            backend.prepare(None)
            prompt = [7 * i % model.geometry.vocabulary for i in range(270)]
            with Engine(model, backend, 300) as engine:
                for params in SAMPLINGS:
                    print(engine.generate_tokens(prompt, params).finish().token_ids)
                engine.reset()
                print(engine.feed(prompt[:11], all_logits=True).sum())


if __name__ == "__main__":
    main()
