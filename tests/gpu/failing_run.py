"""A kernel that writes to an illegal address, in the middle of a reply; then the same model on the CPU."""

from pathlib import Path
from sys import path

path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

from tiny_models import tiny_geometry  # noqa: E402

from numba_atomflow import Engine, SamplingParams  # noqa: E402
from numba_atomflow.backends.cuda.backend import CudaBackend  # noqa: E402
from numba_atomflow.errors import BackendError  # noqa: E402
from numba_atomflow.memory.view import View  # noqa: E402
from numba_atomflow.model.step import SAMPLE  # noqa: E402
from numba_atomflow.ops.cuda.runtime.launch import Launch  # noqa: E402
from numba_atomflow.ops.cuda.token.embedding import EmbedArguments  # noqa: E402

PROMPT, PARAMS = [5, 6, 7, 8], SamplingParams(max_tokens=12)


def fail(backend: CudaBackend) -> None:
    with backend._owner.current():
        good = backend._graphs.launches(5, SAMPLE)[0]  # the embedding of a prompt that no persistent kernel takes
        nowhere = View("nowhere", 0x10, (1 << 20,), "float32")
        table, tokens = backend._model.weights.projections["embedding"].codes, backend._model.buffers["tokens"]
        arguments = EmbedArguments(table, tokens, nowhere)
        Launch(good.kernel, good.ctas, arguments, backend.stream).run()


def main() -> None:
    with Engine.random(tiny_geometry(), "cuda", 64) as engine:
        expected = engine.generate_tokens(PROMPT, PARAMS).finish().token_ids
        assert isinstance(engine.backend, CudaBackend)
        fail(engine.backend)
        try:
            engine.generate_tokens(PROMPT, PARAMS).finish()
        except BackendError as error:
            print(error)
    try:
        Engine.random(tiny_geometry(), "cuda", 64).close()
    except BackendError as error:
        print(error)
    with Engine.random(tiny_geometry(), "auto", 64) as engine:
        assert engine.backend.name == "cpu"
        assert engine.generate_tokens(PROMPT, PARAMS).finish().token_ids == expected
    print("on the CPU all is well")


if __name__ == "__main__":
    main()
