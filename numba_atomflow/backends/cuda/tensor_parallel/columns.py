"""Steps of several tokens on one rank: their launches, and where the most likely tokens are posted.

Steps that verify have a position, tokens, an arg-max and logits of their own: they leave the state of decode steps as
it is, as those of one GPU do (`backends/cuda/verify.py`). One of one token is the kernel of decode steps on them.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from numba_atomflow.backends.cuda.persistent import all_weights, kv_stride
from numba_atomflow.device.driver import call
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Head
from numba_atomflow.ops.cuda.persistent.rank import GREEDY
from numba_atomflow.ops.cuda.persistent.wide_rank import RankWideArguments
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.utils.progress import OpenBar

if TYPE_CHECKING:
    from numba_atomflow.backends.cuda.tensor_parallel.rank import Rank


class RankColumns:
    """A rank's steps of several tokens. The rank's context is current; its launches are bound.

    Attributes:
        choices: the pinned array to which this rank posts the most likely token after each column of a step that
            verifies; the host reads rank 0's.
    """

    def __init__(self, rank: "Rank") -> None:
        self._rank, self._kernels, self._buffers = rank, rank.kernels, rank.buffers
        self.widths = tuple(rank.kernels.wide_shapes)
        step, width = self._buffers["verify.step"], rank.kernels.most_columns
        self._step = np.zeros(step.shape, np.int64)  # position, tokens posted, tokens
        self._position = View("verify.position", step.address, (1,), "int64")
        self._posted = View("verify.posted", step.address + 8, (1,), "int64")
        self._tokens = View("verify.tokens", step.address + 16, (width,), "int32")
        self.choices = PinnedArray((width,), "uint64", rank.owner.resources)
        self._verifying: dict[int, Launch] = {1: self._bind_one()}
        self._prompts: dict[tuple[int, int], Launch] = {}  # by width, and by how far the position moves
        self._tails: dict[tuple[int, bool], list[Launch]] = {}  # by tokens, and with log-probabilities
        rank.memory.write(self._buffers["verify.options"], np.ones(5))  # without penalty

    # --- kernels -----------------------------------------------------------------------------------------------------

    def load(self, widths: Iterable[int], open_bar: OpenBar) -> None:
        """Compile the kernels of these widths, or read them from the cache; nothing may run on any rank meanwhile."""
        self._rank.loaded.open_bar = open_bar
        self._rank.loaded.require(self._kernels.wide[columns].spec for columns in widths)

    def _bind_one(self) -> Launch:
        """A step of one token that verifies."""
        b, end = self._buffers, self._kernels.persistent_shape.ops
        return self._rank.step_launch(
            *(0, end, GREEDY),
            replaced={
                "position": self._position,
                "tokens": self._tokens,
                "logits": b["verify.logits"],
                "best": b["verify.best"],
                "seen": b["verify.seen"],
                "options": b["verify.options"],
                "token_ring": self.choices.view,
                "tokens_posted": self._posted,
                **self._rank.of_others("logits", "verify.logits"),
            },
        )

    def _bind(self, columns: int, *, position: View, choices: View, advance: int) -> Launch:
        """A step of so many tokens, after which the position moves by `advance`."""
        b, rank, planned = self._buffers, self._rank, self._kernels.wide[columns]
        cache, mailbox, vectors = b[KV_CACHE], f"verify.mailbox_x{columns}", f"verify.vectors_x{columns}"
        arguments = RankWideArguments(
            weights=all_weights(rank.weight_views),
            table=b["persistent.table"],
            cache16=cache,
            cache=cache,
            mailbox=b[mailbox],
            vectors=b[vectors],
            tokens=self._tokens,
            position=position,
            steps=b[f"verify.steps_x{columns}"],
            cosines=b["rope.cosines"],
            sines=b["rope.sines"],
            logits=b["verify.logits"],
            best=b["verify.best"],
            choices=choices,
            fault=b["persistent.fault"],
            timestamps=b["persistent.timestamps"],
            **rank.of_others("mailbox", mailbox),
            **rank.of_others("vectors", vectors),
            **rank.of_others("logits", "verify.logits"),
            kv_stride=kv_stride(cache),
            first_op=0,
            end_op=self._kernels.persistent_shape.ops,
            rank=rank.number,
            advance=advance,
        )
        return Launch(rank.loaded[planned.spec.name], planned.ctas, arguments, rank.stream)

    # --- steps -------------------------------------------------------------------------------------------------------

    def send(self, tokens: Sequence[int], position: int) -> None:
        """The tokens of the next step, and its position if it verifies. They are padded to a width."""
        padded = [*tokens, *repeat(tokens[-1], self.width_for(len(tokens)) - len(tokens))]
        self._step[:2] = position, 0
        self._step[2:].view(np.int32)[: len(padded)] = padded
        self._rank.staged.write(self._buffers["verify.step"], self._step)

    def width_for(self, tokens: int) -> int:
        """The number of tokens that so many are padded to."""
        return next(width for width in (1, *self.widths) if width >= tokens)

    def verify(self, tokens: int) -> None:
        """A step of so many tokens, which were sent, that leaves the position as it is. Its kernel is loaded."""
        columns = self.width_for(tokens)
        if columns not in self._verifying:
            self._verifying[columns] = self._bind(
                columns, position=self._position, choices=self.choices.view, advance=0
            )
        self._verifying[columns].run()

    def run_prompt(self, tokens: int, head: Head, *, logprobs: bool) -> None:
        """A prompt's step of so many tokens, from 2 on, which were sent. Its kernel is loaded."""
        columns, advance = self.width_for(tokens), 0 if head.sample else tokens
        if (columns, advance) not in self._prompts:
            position, choices = self._buffers["position"], self._buffers["prompt.choices"]
            self._prompts[columns, advance] = self._bind(columns, position=position, choices=choices, advance=advance)
        self._prompts[columns, advance].run()
        if head.sample:
            for launch in self._tail(tokens, logprobs=logprobs):
                launch.run()

    def _tail(self, tokens: int, *, logprobs: bool) -> list[Launch]:
        """The next token, from the logits of the last of so many, to the host; the position moves."""
        key = tokens, logprobs
        if key not in self._tails:
            row = self._buffers["verify.logits"].rows(tokens - 1, tokens)
            argmax = self._rank.argmax_launch(row)
            sample, said, advance = self._rank.sample_launches(row, tokens)
            self._tails[key] = [argmax, sample, said, advance] if logprobs else [argmax, sample, advance]
        return self._tails[key]

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def _counters(self) -> list[View]:
        """Of completed steps, one for each width."""
        return [self._buffers[f"verify.steps_x{columns}"] for columns in self.widths]

    def steps(self) -> int:
        """Completed steps of the width that has completed most."""
        return max((int(self._rank.memory.read(view)[0]) for view in self._counters), default=0)

    def restart(self, steps: int) -> None:
        """Before the first step, and after one that may have failed: go on with epochs that no rank has used, and
        mark all vectors as not written. All ranks must have finished before, and must wait for each other afterwards.
        """
        memory, best = self._rank.memory, self._buffers["verify.best"]
        for view in self._counters:
            memory.write(view, np.array([steps, 0]))
        memory.write(best, np.full(best.shape, LOWEST_KEY, np.int64))
        for columns in self.widths:
            view = self._buffers[f"verify.vectors_x{columns}"]
            call("cuMemsetD32Async", view.address, ABSENT, view.nbytes // 4, self._rank.stream)
