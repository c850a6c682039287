"""The engine: a checkpoint, a backend and a tokenizer, from text to text.

There are three levels. `Engine.generate` and `Engine.chat` yield text; `Engine.generate_tokens`, on which they are
built, yields token ids and needs no tokenizer. Below them, for research, `feed` runs token ids through the model and
returns logits, `position` is the number of tokens in the KV cache, and `rewind` drops the last of them.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numba_atomflow.backends.base import Backend, Decode, Prefill
from numba_atomflow.backends.choose import BackendChoice, BackendName, make_backend
from numba_atomflow.backends.hooks import Edit, edits_of
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.fingerprint import ModelIdentity, identify
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.constraints.base import ConstraintState
from numba_atomflow.context import ActiveEdits, Context, choose_max_seq_len
from numba_atomflow.errors import AtomFlowError, ClosedError, OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.generation import (
    BaseGeneration,
    FinishReason,
    Generation,
    GenerationState,
    GenerationStats,
    Request,
    TokenGeneration,
    host_sampled_loop,
    needs_logits,
    text_pieces,
    token_loop,
)
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.activations import select
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.scoring import Score, checked_pair, score_pairs
from numba_atomflow.speculation.choose import choose_drafter
from numba_atomflow.speculation.drafter import Drafter
from numba_atomflow.speculation.step_cost import StepCost
from numba_atomflow.state.snapshot import KvSnapshot, check_fits, put_snapshot, take_snapshot
from numba_atomflow.state.state_file import StateFile, check_destination, write_state
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.text.detokenizer import Detokenizer
from numba_atomflow.text.token_table import TokenTable
from numba_atomflow.utils.arguments import file_path, truth_value, whole_number
from numba_atomflow.utils.exclusive_calls import ExclusiveCalls
from numba_atomflow.utils.progress import Progress

Message = Mapping[str, Any]
NewGeneration = TypeVar("NewGeneration", bound=BaseGeneration[Any])

__all__ = ["Engine", "FinishReason", "Generation", "GenerationStats", "Message", "TokenGeneration"]


class Engine:
    """One model on one backend, with one KV cache.

    Threads may take turns. A call while another thread's call runs, or while another thread's generation is in
    progress, raises EngineBusyError; `close` waits for the call. The backend itself, for research, is not guarded.
    After `close`, every use of the backend raises ClosedError. If another program writes into the checkpoint's file,
    a backend that reads the weights there (the CPU's) raises CheckpointError from then on; load the engine again.
    """

    def __init__(self, checkpoint: Checkpoint | RandomModel, backend: Backend, max_seq_len: int) -> None:
        self.checkpoint = checkpoint
        self._context: Context | None = Context(backend, checkpoint.geometry, max_seq_len)
        self.max_seq_len = max_seq_len
        self.load_seconds = 0.0
        self.compile_seconds = 0.0  # of them, for compiling or loading kernels; first prompts may need more
        self._step_cost = StepCost()  # as far as generations have measured it
        self._calls = ExclusiveCalls(survives_fork=backend.name == "cpu")
        # In progress, continuing what the KV cache holds. One that the caller has dropped cannot go on.
        self._generation: weakref.ref[BaseGeneration[Any]] | None = None

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
    ) -> "Engine":
        """Open a checkpoint and make its backend ready to run.

        Args:
            path_or_name: a checkpoint file, or the name of one in the models folder.
            backend: "auto" takes the GPU where there is a usable one, if no number of threads is given.
            max_seq_len: positions of the KV cache; by default 4,096 or the model's limit, if that is less.
            threads: cores that the CPU backend uses; all of them by default. Fewer are faster where other programs keep
                some busy.
            progress: called with what is being done, steps finished and steps in all.
            decode: how the GPU runs decode steps: "graph", kernel after kernel; "persistent", in one kernel; "auto",
                the latter where GPU and model allow it. `engine.backend.decode_path` has the choice.
            device: which GPU, from 0 as the NVIDIA driver numbers them (CUDA_VISIBLE_DEVICES).
            private_copy: read the whole file into memory first: other programs may then write into it. The CPU backend
                otherwise reads weights in the file, and refuses to go on when it changes; the GPU's has a copy anyway.
            prefill: how the GPU runs prompts: "gemv", up to 8 tokens at a time in the kernels of decode steps; "gemm",
                in chunks of many tokens; "fp8", the same with activations rounded to FP8, which changes results a
                little; "auto", today "gemv". `engine.backend.prefill_path` has the choice.
            prefill_chunk: most tokens of a chunk of "gemm" and "fp8"; by default 2,048, or `max_seq_len` if that is
                less. Activations take memory in proportion to it.

        Raises:
            CheckpointError: no such checkpoint, or a damaged one, or one that changed while it was loaded.
            OptionError: a number is out of range, or `decode` or `prefill` is set for the CPU.
            BackendError: the backend cannot run here, or not in the way that `decode` or `prefill` requires.
        """
        started = time.perf_counter()
        choice = BackendChoice(backend, threads, decode, device, prefill, prefill_chunk)
        private = truth_value("private_copy", private_copy)
        checkpoint = Checkpoint.open(find_checkpoint(path_or_name), private_copy=private)
        return cls._make_ready(checkpoint, choice, max_seq_len, progress, started)

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
    ) -> "Engine":
        """A model of this geometry with random weights and no tokenizer (`generate_tokens`), to measure speed with.

        Args and errors are those of `load`, with the `seed` and the `name` of `RandomModel`.
        """
        started = time.perf_counter()
        choice = BackendChoice(backend, threads, decode, device, prefill, prefill_chunk)
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
    ) -> "Engine":
        with ExitStack() as on_error:
            on_error.callback(checkpoint.close)
            positions = choose_max_seq_len(checkpoint.geometry, max_seq_len)
            weights, check = WeightArrays(checkpoint), checkpoint.check_unchanged
            backend = make_backend(choice, checkpoint.geometry, weights, positions, check)
            on_error.callback(backend.close)
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

    def close(self) -> None:
        """Release the backend's memory and the mapped checkpoint; the engine cannot be used afterwards.

        A generation in progress ends; a call that runs in another thread is waited for. Closing twice is safe.
        """
        self._calls.wait_and_run(self._close)

    def _close(self) -> None:
        self._close_generation()
        context, self._context = self._context, None
        if context is not None:
            context.backend.close()
        self.checkpoint.close()

    def _close_generation(self) -> None:
        generation = self._generation() if self._generation is not None else None
        if generation is not None:
            generation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> Backend:
        """The device that runs the model.

        Raises:
            ClosedError: the engine was closed.
        """
        return self._open_context().backend

    def _open_context(self) -> Context:
        if self._context is None:
            raise ClosedError(f"The engine of {self.checkpoint.path} was closed; load it again.")
        return self._context

    @property
    def geometry(self) -> ModelGeometry:
        """The model's shape."""
        return self.checkpoint.geometry

    @cached_property
    def text(self) -> TextCodec:
        """The model's tokenizer and chat template."""
        return TextCodec(self.checkpoint.text)

    @cached_property
    def token_table(self) -> TokenTable:
        """The model's tokens as bytes, for constraints."""
        return TokenTable(self.checkpoint.text, self.geometry.vocabulary)

    @cached_property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decode step must read."""
        return sum(op.weight_bytes for op in self.backend.step(1, SAMPLE))

    # --- tokens and logits ---------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens in the KV cache: the next one is written here."""
        return len(self.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The tokens in the KV cache (a copy)."""
        return list(self._open_context().token_ids)

    def reset(self) -> None:
        """Empty the KV cache."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Drop every token from `position` on. A generation in progress ends here.

        Raises:
            ContextError: the KV cache holds fewer tokens.
            OptionError: `position` is no whole number.
        """
        position = whole_number("position", position)

        def rewind() -> None:
            context = self._open_context()
            self._end_generation()
            context.rewind(position)

        self._calls.run(rewind)

    def feed(self, token_ids: Sequence[int], all_logits: bool = False) -> NDArray[np.float32]:
        """Run tokens through the model and keep them in the KV cache. A generation in progress ends here.

        Args:
            token_ids: at least one.
            all_logits: return the logits of every position, not only of the last.

        Returns:
            float32 [V], or [len(token_ids), V] for all of them: row i predicts the token after token_ids[i].

        Raises:
            ContextError: they do not fit after what the KV cache holds.
            OptionError: there are none, or one is not a token of this model.
        """

        def feed() -> NDArray[np.float32]:
            context = self._open_context()
            ids = context.checked(token_ids, used=len(context.token_ids))
            self._end_generation()
            return context.feed_all_logits(ids) if all_logits else context.feed(ids)

        return self._calls.run(feed)

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Score:
        """How likely a continuation is after a prompt: two texts, or two lists of token ids.

        What the KV cache holds of the prompt is not computed again. A generation in progress ends here.

        Where the texts meet, the tokens are those of lm-evaluation-harness (`TextCodec.encode_pair`).

        Raises:
            ContextError: they do not fit into the context.
            OptionError: one is empty, or holds an unknown token id, or they are of different kinds.
        """
        return self.score_many([(prompt, continuation)])[0]

    def score_many(
        self,
        pairs: Iterable[tuple[str | Sequence[int], str | Sequence[int]]],
        progress: Progress | None = None,
    ) -> list[Score]:
        """`score` of many prompts and continuations, in order. What several of them begin with is computed once.

        The order of the pairs does not matter; scores may differ from those of `score` by the rounding of float32.

        Args:
            pairs: of a prompt and a continuation each.
            progress: called with token sequences done, and in all.

        Raises:
            ContextError, OptionError: as `score`.
        """

        def score_many() -> list[Score]:
            context = self._open_context()
            checked = [
                checked_pair(context, *self._encoded_pair(prompt, continuation)) for prompt, continuation in pairs
            ]
            self._end_generation()
            return score_pairs(context, checked, progress)

        return self._calls.run(score_many)

    def _encoded_pair(
        self, prompt: str | Sequence[int], continuation: str | Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        if isinstance(prompt, str) and isinstance(continuation, str):
            return self.text.encode_pair(prompt, continuation)
        if isinstance(prompt, str) or isinstance(continuation, str):
            raise OptionError("A prompt and its continuation must both be texts, or both be lists of token ids.")
        return prompt, continuation

    # --- snapshots of the KV cache -------------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> ModelIdentity:
        return identify(self.checkpoint)

    def snapshot(self) -> KvSnapshot:
        """Copy what the KV cache holds to host memory. A generation in progress goes on afterwards.

        Within `edit`, this is the way to keep what was computed under the edits.

        Raises:
            CheckpointError: the model's file was changed by another program.
        """
        return self._calls.run(lambda: take_snapshot(self._open_context(), self.geometry, self._identity))

    def restore(self, snapshot: KvSnapshot) -> None:
        """Replace what the KV cache holds by a snapshot of it, or of a prefix of it (`KvSnapshot.prefix`).

        The snapshot is of this model, in the KV format of this backend: float32 on the CPU, float16 on a GPU. Then the
        next tokens are those that followed when it was taken. A generation in progress ends here.

        Raises:
            StateError: the snapshot is of another model or KV format.
            ContextError: it has more tokens than the KV cache has positions.
            OptionError: it is no snapshot.
        """
        if not isinstance(snapshot, KvSnapshot):
            raise OptionError(f"snapshot is {quote(snapshot)}; give what Engine.snapshot has returned.")

        def restore() -> None:
            context = self._open_context()
            check_fits(snapshot, context, self.geometry, self._identity)
            self._end_generation()
            put_snapshot(snapshot, context)

        self._calls.run(restore)

    def save_state(
        self,
        path: str | Path,
        messages: Sequence[Message] = (),
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write what the KV cache holds to a file, which appears complete or not at all.

        Args:
            path: of the file, a safetensors file.
            messages: the conversation that led to it, to be stored with it.
            overwrite: replace a file that exists.
            progress: called with bytes done and bytes in all.

        Raises:
            DestinationError: the file exists, or cannot be written.
            OptionError: the messages are not plain data.
        """
        file = file_path("path", path)
        check_destination(file, overwrite)
        write_state(file, self.snapshot(), messages, overwrite, progress)

    def load_state(self, path: str | Path, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Replace what the KV cache holds by what `save_state` wrote; the conversation that was stored with it.

        As `restore`, of the same model and backend; until the file has been checked, nothing changes.

        Raises:
            StateError: the file is missing, damaged, or of another model or KV format.
            ContextError: it has more tokens than the KV cache has positions.
        """
        file = file_path("path", path)

        def load() -> list[dict[str, Any]]:
            context = self._open_context()
            with StateFile(file) as state:
                check_fits(state.snapshot, context, self.geometry, self._identity, str(file))
                state.verify(progress)
                messages = state.messages()
                self._end_generation()
                state.restore(context)
            return messages

        return self._calls.run(load)

    # --- hooks for research --------------------------------------------------------------------------------------

    def capture(self, prompt: str | Sequence[int], activations: str | Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Run a prompt and return activations of all its tokens. Afterwards the KV cache holds the prompt.

        Args:
            prompt: a text or token ids, of any length that fits the context.
            activations: names such as "layer.3.attention", or globs such as "layer.*.output".

        Returns:
            float32 [tokens, width] by name; inside of `edit`, what the edits have made of them.

        Raises:
            OptionError: an unknown name or token, or an empty prompt.
            ContextError: the prompt does not fit.
        """

        def capture() -> dict[str, NDArray[np.float32]]:
            context = self._open_context()
            chosen = select(activations, self.geometry)
            ids = context.checked(self.text.encode(prompt) if isinstance(prompt, str) else prompt, used=0)
            self._end_generation()
            return context.capture(ids, chosen)

        return self._calls.run(capture)

    def unembed(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Final norm and LM head of any rows of a residual stream, such as the output of a layer in the middle.

        Edits have no effect here. A generation in progress goes on afterwards.

        Args:
            rows: numbers [n, hidden], n at least 1.

        Returns:
            Logits, float32 [n, V].

        Raises:
            OptionError: `rows` has another shape, or no finite numbers.
        """
        hidden, array = self.geometry.hidden, np.asarray(rows)
        if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != hidden or not len(array):
            raise OptionError(f"rows is {array.dtype} {list(array.shape)}; it must be numbers of shape [n, {hidden}].")
        if not np.isfinite(array).all():
            raise OptionError("rows holds NaN or infinity; give finite numbers.")
        return self._calls.run(lambda: self._open_context().unembed(array.astype(np.float32)))

    @contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Within the block, change activations while prompts and generated tokens run: steering, ablation, patching.

            with engine.edit({"layer.12.output": lambda rows, position: rows + direction}):
                print(engine.generate("Once upon a time").finish().text)

        `generate` and `chat` compute their prompt anew under the edits; `feed` continues what the KV cache holds. At
        the end of the block, or on an exception, what was computed under the edits is dropped from the KV cache, and a
        generation in progress ends. Blocks may be nested: outer edits come first.

        Args:
            edits: functions by name or glob. They get rows float32 [tokens, width], read-only, and
                the position of the first, and return rows of the same shape, or None to change nothing. They must not
                call the engine.

        Raises:
            OptionError: an unknown activation, or one that cannot be edited; a function returns anything else.
        """

        def begin() -> tuple[Context, ActiveEdits]:
            context = self._open_context()
            chosen = edits_of(edits, self.geometry)
            self._end_generation()
            return context, context.begin_edits(chosen)

        context, active = self._calls.run(begin)

        def end() -> None:
            if self._context is not context:  # closed
                return
            self._close_generation()
            context.end_edits(active)

        try:
            yield
        finally:
            self._calls.wait_and_run(end)

    def _end_generation(self) -> None:
        """Interrupt a generation before the KV cache changes under it.

        Raises:
            EngineBusyError: it belongs to another thread.
        """
        generation = self._generation() if self._generation is not None else None
        if generation is not None:
            generation.interrupt()
        self._generation = None

    # --- generation ----------------------------------------------------------------------------------------------

    def generate_tokens(
        self, token_ids: Sequence[int], params: SamplingParams | None = None, *, drafter: Drafter | None = None
    ) -> TokenGeneration:
        """Continue a list of token ids by token ids: `generate` for models without a tokenizer, and for scripts.

        Raises:
            ContextError: the prompt leaves no room for a token.
            OptionError: the prompt is empty, or holds an unknown token id; or there are stop strings; or a drafter
                where the backend has no use for one.
        """
        started = time.perf_counter()
        checked_params = _checked(params)
        if checked_params.stop:
            raise OptionError("Stop strings need text; use generate, or leave them out of generate_tokens.")
        request = self._request(self._open_context().checked(token_ids, used=0), checked_params, started, drafter)

        def start(reused: int) -> TokenGeneration:
            return TokenGeneration(lambda state: self._token_loop(state, request, reused), self._calls)

        return self._begin(request, start)

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, drafter: Drafter | None = None
    ) -> Generation:
        """Continue a text, or a list of token ids. What the KV cache already holds of it is not computed again.

        There is one KV cache, so a new generation interrupts the one before.

        Args:
            prompt: the text, or its token ids.
            params: how tokens are sampled, and when the reply ends.
            drafter: what proposes tokens in place of prompt lookup (docs/speculation.md).

        Raises:
            ContextError: the prompt leaves no room for a token.
            OptionError: the prompt is empty, or holds an unknown token id; or there is a drafter where the backend has
                no use for one.
        """
        started = time.perf_counter()
        detokenizer = self.text.stream()
        prompt = self._open_context().checked(self.text.encode(prompt) if isinstance(prompt, str) else prompt, used=0)
        for token in prompt:
            detokenizer.push(token)  # some tokenizers write a space before every word but the prompt's first
        return self._generate(prompt, detokenizer, params, started, drafter)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        drafter: Drafter | None = None,
    ) -> Generation:
        """Reply to a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, in the shape of OpenAI's interface; roles are system,
                developer, user, assistant and tool. The content is a text or a list of text parts.
            params: how tokens are sampled, and when the reply ends.
            template_variables: what the model's chat template may be told besides, such as
                ``{"enable_thinking": False}`` or ``{"tools": [...]}``; plain data.
            drafter: as of `generate`.

        Raises:
            TextError: the model has no chat template, or the template refuses the messages or fails on them.
            OptionError: a template variable has a reserved name, or is no plain data; or as in `generate`.
            ContextError: the conversation leaves no room for a token.
        """
        started = time.perf_counter()
        prompt = self._open_context().checked(self.text.encode_chat(messages, template_variables), used=0)
        return self._generate(prompt, self.text.stream(), params, started, drafter)

    def chat_tokens(self, token_ids: Sequence[int], params: SamplingParams | None = None) -> Generation:
        """`chat` with a conversation that `text.encode_chat` has made token ids.

        Unlike after `generate`, the reply begins a text: tokenizers that mark a space before every word write none
        before its first.

        Raises:
            ContextError: the conversation leaves no room for a token.
            OptionError: it is empty, or holds an unknown token id.
        """
        started = time.perf_counter()
        return self._generate(self._open_context().checked(token_ids, used=0), self.text.stream(), params, started)

    def _generate(
        self,
        prompt: list[int],
        detokenizer: Detokenizer,
        params: SamplingParams | None,
        started: float,
        drafter: Drafter | None = None,
    ) -> Generation:
        request = self._request(prompt, _checked(params), started, drafter)

        def start(reused: int) -> Generation:
            def pieces(state: GenerationState) -> Iterator[str]:
                return text_pieces(state, self._token_loop(state, request, reused), detokenizer, request.params)

            return Generation(pieces, self._calls)

        return self._begin(request, start)

    def _request(self, prompt: list[int], params: SamplingParams, started: float, drafter: Drafter | None) -> Request:
        eos_ids = () if params.ignore_eos else self.checkpoint.text.eos_ids
        obstacle = self.backend.verification.reason
        drafter = choose_drafter(params.speculate, drafter, obstacle, self._step_cost)
        return Request(prompt, params, eos_ids, started, self._constraint_state(params), drafter)

    def _constraint_state(self, params: SamplingParams) -> ConstraintState | None:
        if params.constraint is None:
            return None
        if not self.checkpoint.text.eos_ids:
            raise OptionError("The model has no EOS token to end a constrained reply with; leave the constraint out.")
        return params.constraint.start(self.token_table)

    def _token_loop(self, state: GenerationState, request: Request, reused: int) -> Iterator[int]:
        """The loop that generates; refers to the engine, which therefore lives as long as its generation runs."""
        loop = host_sampled_loop if needs_logits(request) else token_loop
        yield from loop(state, self._open_context(), request, reused)

    def _begin(self, request: Request, start: Callable[[int], NewGeneration]) -> NewGeneration:
        """The generation that `start` returns, given how much of the prompt is in the KV cache already."""

        def begin() -> NewGeneration:
            context = self._open_context()
            self._end_generation()
            if request.params.prompt_logprobs is None:
                reused = context.rewind_to_common_prefix(request.prompt)
            else:  # the KV cache has no logits
                context.rewind(reused := 0)
            generation = start(reused)
            self._generation = weakref.ref(generation)
            return generation

        return self._calls.run(begin)


def _checked(params: SamplingParams | None) -> SamplingParams:
    """The caller's options, or the default ones."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise OptionError(f"params is {quote(params)}; give SamplingParams(...), or nothing.")
    return params
