"""The engine: a checkpoint, a backend and a tokenizer, made into text.

Three levels. `Engine.generate` and `Engine.chat` yield text as it is made; `Engine.generate_tokens`, on which they
stand, yields token ids and needs no tokenizer. Below them, for research, `feed` takes token ids through the model and
returns logits, `position` says how many tokens the KV cache holds, and `rewind` drops the last.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend, Decode
from numba_atomflow.backends.choose import BackendName, check_decode, check_name, make_backend
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.format import TOKENIZER, Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.errors import AtomFlowError, ClosedError, ContextError, OptionError
from numba_atomflow.files.untrusted import shown
from numba_atomflow.generation import (
    FinishReason,
    Generation,
    GenerationStats,
    Reply,
    ReplyState,
    TokenGeneration,
)
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Head
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.text.detokenizer import Detokenizer
from numba_atomflow.text.stop_strings import StopStrings
from numba_atomflow.utils.arguments import truth_value, whole_number
from numba_atomflow.utils.one_caller import OneCaller
from numba_atomflow.utils.progress import Progress

DEFAULT_MAX_SEQ_LEN = 4096  # positions, where the model allows as many

Message = Mapping[str, Any]
NewReply = TypeVar("NewReply", bound=Reply[Any])

__all__ = ["Engine", "FinishReason", "Generation", "GenerationStats", "Message", "TokenGeneration"]


class Engine:
    """One model on one backend, with one KV cache.

    Threads may take turns. A call while another thread's call runs, or while a reply is in the making that another
    thread holds, raises EngineBusyError; `close` waits for the call. The backend itself, for research, is not guarded.
    After `close`, whatever needs the backend raises ClosedError. If another program writes into the checkpoint's file,
    a backend that reads the weights there (the CPU's) raises CheckpointError from then on; load the engine again.
    """

    def __init__(self, checkpoint: Checkpoint | RandomModel, backend: Backend, max_seq_len: int) -> None:
        self.checkpoint = checkpoint
        self._backend: Backend | None = backend
        self.max_seq_len = max_seq_len
        self.load_seconds = 0.0
        self.compile_seconds = 0.0  # of them, spent on compiling kernels or loading them from the cache
        self._tokens: list[int] = []  # what the KV cache holds, in order
        self._calls = OneCaller(survives_fork=backend.name == "cpu")
        # In the making, going on from what the KV cache holds. One that nobody holds cannot go on.
        self._reply: weakref.ref[Reply[Any]] | None = None

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
        private_copy: bool = False,
    ) -> "Engine":
        """Open a checkpoint and make its backend ready to run.

        Args:
            path_or_name: a checkpoint file, or the name of one in the models folder.
            backend: "auto" takes the GPU where there is a usable one, if no number of threads is given.
            max_seq_len: positions of the KV cache; by default 4,096 or what the model was made for, if that is less.
            threads: cores that the CPU backend uses; all of them by default. Fewer are faster where other programs keep
                some busy.
            progress: called with what is being done, steps finished and steps in all.
            decode: how the GPU runs decode steps: "graph", kernel after kernel; "persistent", in one kernel; "auto",
                in the latter where GPU and model allow it. `engine.backend.decode_path` has what was chosen.
            private_copy: read the whole file into memory first: other programs may then write into it. The CPU backend
                otherwise reads weights in the file, and refuses to go on when it changes; the GPU's has a copy anyway.

        Raises:
            CheckpointError: no such checkpoint, or a damaged one, or one that changed while it was loaded.
            OptionError: `max_seq_len` or `threads` is out of range, or `decode` is given for the CPU.
            BackendError: the backend cannot run here, or not in the way that `decode` asks for.
        """
        started = time.perf_counter()
        check_name(backend)
        check_decode(decode, backend, threads)
        copied = truth_value("private_copy", private_copy)
        checkpoint = Checkpoint.open(find_checkpoint(path_or_name), private_copy=copied)
        return cls._make_ready(checkpoint, backend, max_seq_len, threads, progress, decode, started)

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
        seed: int = 0,
        name: str = "random",
    ) -> "Engine":
        """A model of this geometry with random weights and no tokenizer (`generate_tokens`), to measure speed with.

        Args and errors are those of `load`, with the `seed` and the `name` of `RandomModel`.
        """
        started = time.perf_counter()
        check_name(backend)
        check_decode(decode, backend, threads)
        if not isinstance(geometry, ModelGeometry):
            raise OptionError(f"geometry is {shown(geometry)}; it must be a ModelGeometry.")
        model = RandomModel(geometry, seed, name)
        return cls._make_ready(model, backend, max_seq_len, threads, progress, decode, started)

    @classmethod
    def _make_ready(
        cls,
        checkpoint: Checkpoint | RandomModel,
        backend: BackendName,
        max_seq_len: int | None,
        threads: int | None,
        progress: Progress | None,
        decode: Decode,
        started: float,
    ) -> "Engine":
        with ExitStack() as refused:
            refused.callback(checkpoint.close)
            positions = choose_max_seq_len(checkpoint.geometry, max_seq_len)
            weights, check = WeightArrays(checkpoint), checkpoint.check_unchanged
            device = make_backend(backend, checkpoint.geometry, weights, positions, threads, decode, check)
            refused.callback(device.close)
            try:
                device.prepare(progress)
            except AtomFlowError:  # it may come of weights that are being written
                check()
                raise
            check()
            engine = cls(checkpoint, device, positions)
            refused.pop_all()
        engine.compile_seconds = device.compile_seconds
        engine.load_seconds = time.perf_counter() - started
        return engine

    def close(self) -> None:
        """Release the backend's memory and the mapped checkpoint; the engine cannot be used afterwards.

        A reply in the making ends; a call that runs in another thread is waited for. Closing twice is fine.
        """
        self._calls.wait_and_run(self._close)

    def _close(self) -> None:
        reply = self._reply() if self._reply is not None else None
        if reply is not None:
            reply.close()
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
        self.checkpoint.close()

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
        if self._backend is None:
            raise ClosedError(f"The engine of {self.checkpoint.path} was closed; load it again.")
        return self._backend

    @property
    def geometry(self) -> ModelGeometry:
        """The model's shape."""
        return self.checkpoint.geometry

    @cached_property
    def text(self) -> TextCodec:
        """The model's tokenizer and chat template."""
        return TextCodec(self.checkpoint.text)

    @cached_property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decode step must read."""
        return sum(op.weight_bytes for op in self.backend.step(1, SAMPLE))

    # --- tokens and logits ---------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens that the KV cache holds: the next one is written here."""
        return len(self.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The tokens that the KV cache holds (a copy)."""
        _ = self.backend  # it must be there
        return list(self._tokens)

    def reset(self) -> None:
        """Forget everything."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Forget every token from `position` on. A reply in the making ends here.

        Raises:
            ContextError: the KV cache holds fewer tokens.
            OptionError: `position` is no whole number.
        """
        position = whole_number("position", position)
        self._calls.run(lambda: self._rewind(position))

    def _rewind(self, position: int) -> None:
        backend, held = self.backend, len(self._tokens)
        self._end_reply()
        if not 0 <= position <= held:
            raise ContextError(f"The context holds {held} tokens; it cannot be rewound to {shown(position)}.")
        del self._tokens[position:]
        backend.seek(position)

    def feed(self, token_ids: Sequence[int], all_logits: bool = False) -> NDArray[np.float32]:
        """Take tokens through the model and keep them in the KV cache. A reply in the making ends here.

        Args:
            token_ids: at least one.
            all_logits: return the logits of every position, not only of the last.

        Returns:
            float32 [V], or [len(token_ids), V] for all of them: row i predicts the token after token_ids[i].

        Raises:
            ContextError: they do not fit behind what the KV cache holds.
            OptionError: there are none, or one is not a token of this model.
        """
        return self._calls.run(lambda: self._feed(token_ids, all_logits))

    def _feed(self, token_ids: Sequence[int], all_logits: bool) -> NDArray[np.float32]:
        backend, ids = self.backend, self._checked(token_ids, len(self._tokens))
        self._end_reply()
        if all_logits:
            rows = []
            for start in range(0, len(ids), backend.prefill_chunk):
                block = ids[start : start + backend.prefill_chunk]
                self._prefill(block, NO_LOGITS)
                rows.append(backend.logits(0, len(block)))
            return np.concatenate(rows)
        self._prefill(ids, NO_LOGITS)
        last = (len(ids) - 1) % backend.prefill_chunk
        logits: NDArray[np.float32] = backend.logits(last, last + 1)[0]
        return logits

    def _end_reply(self) -> None:
        """Interrupt a reply before the KV cache changes under it.

        Raises:
            EngineBusyError: it is another thread's.
        """
        reply = self._reply() if self._reply is not None else None
        if reply is not None:
            reply.make_way()
        self._reply = None

    def _checked(self, token_ids: Sequence[int], taken: int) -> list[int]:
        """The tokens as a list, sure to be of this model and to fit behind `taken` others."""
        ids = _whole_numbers(token_ids)
        if not ids:
            raise OptionError("The prompt is empty; give at least one token.")
        vocabulary = self.geometry.vocabulary
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocabulary:
                raise OptionError(f"Token {shown(token)} does not exist; the vocabulary has {vocabulary} tokens.")
        if len(ids) > self.max_seq_len - taken:
            behind = f", of which {taken} are taken" if taken else ""
            raise ContextError(
                f"The prompt has {len(ids)} tokens, but the context holds {self.max_seq_len}{behind}; "
                f"shorten it or raise --max-seq-len (the model allows {self.geometry.max_positions})."
            )
        return ids

    def _prefill(self, token_ids: Sequence[int], head: Head) -> None:
        """Feed in blocks; only the last one needs a head."""
        backend = self.backend
        backend.seek(len(self._tokens))  # a step that was interrupted (Ctrl-C) may have left it elsewhere
        for start in range(0, len(token_ids), backend.prefill_chunk):
            block = token_ids[start : start + backend.prefill_chunk]
            last = start + len(block) == len(token_ids)
            backend.prefill(block, head if last else NO_LOGITS)
            self._tokens.extend(block)

    # --- replies -------------------------------------------------------------------------------------------------

    def generate_tokens(self, token_ids: Sequence[int], params: SamplingParams | None = None) -> TokenGeneration:
        """Continue a list of token ids by token ids: `generate` for models without a tokenizer, and for scripts.

        Raises:
            ContextError: the prompt leaves no room for a token.
            OptionError: the prompt is empty, or holds an unknown token id; or there are stop strings.
        """
        started = time.perf_counter()
        chosen = _given(params)
        if chosen.stop:
            raise OptionError("Stop strings need text; use generate, or leave them out of generate_tokens.")
        prompt = self._checked(token_ids, taken=0)

        def start(reused: int) -> TokenGeneration:
            return TokenGeneration(lambda state: self._token_loop(state, prompt, reused, chosen, started), self._calls)

        return self._begin(prompt, start)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generation:
        """Continue a text, or a list of token ids. What the KV cache already holds of it is not computed again.

        There is one KV cache, so a new reply interrupts the one before.

        Raises:
            ContextError: the prompt leaves no room for a token.
            OptionError: the prompt is empty, or holds an unknown token id.
        """
        started = time.perf_counter()
        decoder = self.text.stream()
        prompt = self._checked(self.text.encode(prompt) if isinstance(prompt, str) else prompt, taken=0)
        for token in prompt:
            decoder.push(token)  # some tokenizers write a space before every word but the first: the prompt was first
        return self._start(prompt, decoder, params, started)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Reply to a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, in the shape of OpenAI's interface; roles are system,
                developer, user, assistant and tool. The content is a text or a list of text parts.
            params: how tokens are chosen, and when the reply ends.
            template_variables: what the model's chat template may be told besides, such as
                ``{"enable_thinking": False}`` or ``{"tools": [...]}``; plain data.

        Raises:
            TextError: the model has no chat template, or the template refuses the messages or fails on them.
            OptionError: a template variable has a reserved name, or is no plain data.
            ContextError: the conversation leaves no room for a token.
        """
        started = time.perf_counter()
        prompt = self._checked(self.text.encode_chat(messages, template_variables), taken=0)
        return self._start(prompt, self.text.stream(), params, started)

    def _start(
        self, prompt: list[int], decoder: Detokenizer, params: SamplingParams | None, started: float
    ) -> Generation:
        chosen = _given(params)

        def start(reused: int) -> Generation:
            def pieces(state: ReplyState) -> Iterator[str]:
                return _pieces(state, self._token_loop(state, prompt, reused, chosen, started), decoder, chosen)

            return Generation(pieces, self._calls)

        return self._begin(prompt, start)

    def _begin(self, prompt: list[int], start: Callable[[int], NewReply]) -> NewReply:
        """The reply that `start` makes, told how much of the prompt need not be computed again."""

        def begin() -> NewReply:
            reply = start(self._rewind_to_common_prefix(prompt))
            self._reply = weakref.ref(reply)
            return reply

        return self._calls.run(begin)

    def _rewind_to_common_prefix(self, token_ids: Sequence[int]) -> int:
        """Keep what the KV cache and the prompt share; at least one token is left to be fed."""
        shared = 0
        for held, wanted in zip(self._tokens, token_ids[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        self._rewind(shared)
        return shared

    def _token_loop(
        self, state: ReplyState, prompt: list[int], reused: int, params: SamplingParams, started: float
    ) -> Iterator[int]:
        """Generate token by token. A backend may work while the host goes on: `sampled_tokens` is what waits for it."""
        stats = state.stats
        stats.prompt_tokens, stats.reused_tokens = len(prompt), reused
        eos_ids = () if params.ignore_eos else self.checkpoint.text.eos_ids
        backend = self.backend
        backend.start(Sampler(params, self.geometry.vocabulary, prompt))
        self._prefill(prompt[reused:], SAMPLE)
        tokens = backend.sampled_tokens()
        stats.ttft = time.perf_counter() - started
        while True:
            for number, token in enumerate(tokens, 1):
                state.token_ids.append(token)
                stats.tokens += 1
                if token in eos_ids:
                    state.finish_reason = "eos"
                elif params.max_tokens is not None and stats.tokens >= params.max_tokens:
                    state.finish_reason = "max_tokens"
                elif len(self._tokens) >= self.max_seq_len:
                    state.finish_reason = "context"
                yield token
                if state.finish_reason:
                    return
                if number < len(tokens):  # the step that sampled it has also put it into the KV cache
                    self._tokens.append(token)
            backend.decode()
            self._tokens.append(tokens[-1])
            tokens = backend.sampled_tokens()
            stats.decode_seconds = time.perf_counter() - started - stats.ttft


def _pieces(state: ReplyState, tokens: Iterator[int], decoder: Detokenizer, params: SamplingParams) -> Iterator[str]:
    """Text that is sure to belong to the reply, as its tokens come."""
    stops = StopStrings(params.stop)
    for token in tokens:
        piece = "" if state.finish_reason == "eos" else stops.push(decoder.push(token))
        if params.stop and (hidden := decoder.special_text(token)):
            piece += stops.push(hidden, shown=False)
        if stops.found:
            state.finish_reason = "stop"
        if piece:
            yield piece
        if stops.found:
            return
    rest = stops.push(decoder.flush()) + stops.flush()
    if rest:
        yield rest


class WeightArrays(Mapping[str, NDArray[Any]]):
    """A model's weights by name, each made or mapped when it is asked for."""

    def __init__(self, checkpoint: Checkpoint | RandomModel) -> None:
        self._checkpoint = checkpoint
        self._names = dict.fromkeys(name for name in checkpoint.names() if name != TOKENIZER)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._checkpoint.array(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def choose_max_seq_len(geometry: ModelGeometry, wanted: int | None) -> int:
    """Positions of the KV cache.

    Raises:
        OptionError: `wanted` is not between 1 and the model's limit.
    """
    if wanted is None:
        return min(geometry.max_positions, DEFAULT_MAX_SEQ_LEN)
    wanted = whole_number("max_seq_len", wanted)
    if not 1 <= wanted <= geometry.max_positions:
        raise OptionError(f"max_seq_len is {shown(wanted)}; this model allows 1 to {geometry.max_positions} positions.")
    return wanted


def _given(params: SamplingParams | None) -> SamplingParams:
    """The caller's options, or the default ones."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise OptionError(f"params is {shown(params)}; give SamplingParams(...), or nothing.")
    return params


def _whole_numbers(token_ids: Sequence[int]) -> list[int]:
    """Token ids of whatever kind, as a list."""
    wrong = f"Token ids must be a flat list of whole numbers, not {shown(token_ids)}."
    if isinstance(token_ids, str | bytes | Mapping) or not isinstance(token_ids, Iterable):
        raise OptionError(wrong)
    try:
        ids = list(token_ids)
        if all(type(token) is int for token in ids):  # a long prompt is that
            return ids
        return [whole_number("a token", token) for token in ids]
    except (TypeError, OptionError):  # an array without dimensions cannot be iterated over
        raise OptionError(wrong) from None
