"""`Engine`: all calls together, and how an engine is made."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from numba_atomflow.backends.base import Backend, Decode, Prefill
from numba_atomflow.backends.choose import BackendChoice, BackendName, Gpus, make_backend
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.context import choose_max_seq_len
from numba_atomflow.engine.activations import Activations
from numba_atomflow.engine.drafts import Drafts, check_same_tokens, check_several_tokens
from numba_atomflow.engine.replies import Replies
from numba_atomflow.engine.saved_states import SavedStates
from numba_atomflow.engine.scores import Scores
from numba_atomflow.errors import AtomFlowError, OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.utils.arguments import truth_value
from numba_atomflow.utils.progress import Progress


class Engine(Replies, Scores, SavedStates, Activations, Drafts):
    """One model on one backend, with one KV cache.

    Threads may take turns. A call while another thread's call runs, or while another thread's generation is in
    progress, raises EngineBusyError; `close` waits for the call. The backend itself, for research, is not guarded.
    After `close`, every use of the backend raises ClosedError. If another program writes into the checkpoint's file,
    a backend that reads the weights there (the CPU's) raises CheckpointError from then on; load the engine again.
    """

    @classmethod
    def load(
        cls,
        path_or_name: str | Path = DEFAULT_MODEL,
        backend: BackendName = "auto",
        max_seq_len: int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        *,
        decode: Decode = "auto",
        device: int = 0,
        private_copy: bool = False,
        prefill: Prefill = "auto",
        prefill_chunk: int | None = None,
        gpus: Gpus = 1,
        draft: str | Path | None = None,
    ) -> "Engine":
        """Open a checkpoint and make its backend ready to run.

        Args:
            path_or_name: a checkpoint file, or the name of one in the models folder.
            backend: "auto" takes the GPU where there is a usable one, if no number of threads is given.
            max_seq_len: positions of the KV cache; by default 4,096 or the model's limit, if that is less.
            threads: that the CPU backend uses; by default one per core, or what a CPU quota allows.
            progress: called with what is being done, steps finished and steps in all.
            decode: how the GPU runs decode steps: "graph", kernel after kernel; "persistent", in one kernel; "auto",
                the latter where GPU and model allow it. `engine.backend.decode_path` has the choice.
            device: which GPU, from 0 as the NVIDIA driver numbers them (CUDA_VISIBLE_DEVICES).
            private_copy: read the whole file into memory first: other programs may then write into it. The CPU backend
                otherwise reads weights in the file, and refuses to go on when it changes; the GPU's has a copy anyway.
            prefill: how the GPU runs prompts: "gemv", up to 8 tokens at a time in the kernels of decode steps; "gemm",
                in chunks of many tokens; "fp8", the same with activations rounded to FP8, which changes results a
                little; "auto", "gemm" where it can run. `engine.backend.prefill_path` has the choice.
            prefill_chunk: most tokens of a chunk of "gemm" and "fp8"; by default 2,048, or `max_seq_len` if that is
                less. Activations take memory in proportion to it.
            gpus: how many GPUs of this machine share the model, each with its part of every matrix (docs/many-gpus.md):
                a number, counted from `device` on; "all"; or the GPUs' numbers. They give the bits of one GPU, and run
                prompts a token at a time.
            draft: a smaller model of the same tokens, whose proposals this one checks (docs/speculation.md): as
                `path_or_name`. It runs on the same device, with as many positions as it allows.

        Raises:
            CheckpointError: no such checkpoint, or a damaged one, or one that changed while it was loaded.
            OptionError: a number is out of range, or `decode` or `prefill` is set for the CPU, or so many GPUs cannot
                share the model, or `draft` has other tokens, or nothing could check its proposals.
            TextError: the draft model has another tokenizer than this one, and one of them cannot be used.
            BackendError: the backend cannot run here, or not in the way that `decode` or `prefill` requires.
        """
        started = time.perf_counter()
        choice = BackendChoice(backend, threads, decode, device, prefill, prefill_chunk, gpus)
        private = truth_value("private_copy", private_copy)
        checkpoint = Checkpoint.open(find_checkpoint(path_or_name), private_copy=private)
        if draft is None:
            return cls._make_ready(checkpoint, choice, max_seq_len, progress, started)
        with ExitStack() as on_error:
            on_error.callback(checkpoint.close)
            smaller = Checkpoint.open(find_checkpoint(draft, "draft"), private_copy=private)
            on_error.callback(smaller.close)
            check_same_tokens(checkpoint, smaller)
            engine = cls._make_ready(checkpoint, choice, max_seq_len, progress, started, check_several_tokens)
            on_error.callback(engine.close)
            positions = min(engine.max_seq_len, smaller.geometry.max_positions)
            name: BackendName = "cpu" if engine.backend.name == "cpu" else "cuda"
            same_device = BackendChoice(name, choice.threads, device_ordinal=device)
            proposing = cls._make_ready(smaller, same_device, positions, progress, started)
            on_error.callback(proposing.close)
            engine._own_draft(proposing)  # noqa: SLF001
            on_error.pop_all()
        engine.load_seconds = time.perf_counter() - started
        return engine

    @classmethod
    def random(
        cls,
        geometry: ModelGeometry,
        backend: BackendName = "auto",
        max_seq_len: int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        *,
        decode: Decode = "auto",
        device: int = 0,
        seed: int = 0,
        name: str = "random",
        prefill: Prefill = "auto",
        prefill_chunk: int | None = None,
        gpus: Gpus = 1,
    ) -> "Engine":
        """A model of this geometry with random weights and no tokenizer (`generate_tokens`), to measure speed with.

        Args and errors are those of `load`, with the `seed` and the `name` of `RandomModel`.
        """
        started = time.perf_counter()
        choice = BackendChoice(backend, threads, decode, device, prefill, prefill_chunk, gpus)
        if not isinstance(geometry, ModelGeometry):
            raise OptionError(f"geometry is {quote(geometry)}; it must be a ModelGeometry.")
        model = RandomModel(geometry, seed, name)
        return cls._make_ready(model, choice, max_seq_len, progress, started)

    @classmethod
    def _make_ready(
        cls,
        checkpoint: Checkpoint | RandomModel,
        choice: BackendChoice,
        max_seq_len: int | None,
        progress: Progress | None,
        started: float,
        check_backend: Callable[[Backend], None] = lambda backend: None,
    ) -> "Engine":
        with ExitStack() as on_error:
            on_error.callback(checkpoint.close)
            positions = choose_max_seq_len(checkpoint.geometry, max_seq_len)
            weights, check = WeightArrays(checkpoint), checkpoint.check_unchanged
            backend = make_backend(choice, checkpoint.geometry, weights, positions, check)
            on_error.callback(backend.close)
            check_backend(backend)
            try:
                backend.prepare(progress)
            except AtomFlowError:  # the cause may be that another program is writing the weights
                check()
                raise
            check()
            engine = cls(checkpoint, backend, positions)
            on_error.pop_all()
        engine.compile_seconds = backend.compile_seconds
        engine.load_seconds = time.perf_counter() - started
        return engine
