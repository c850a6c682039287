"""The persistent decode kernel against NumPy, at small shapes: the same checks in numba's simulator and on a GPU.

A case has a whole model's memory: weights in one array as the kernel reads them, the cache, the mailbox, and a view
for each op. Results begin as NaN, as does the cache beyond the past; the mailbox as words of the token before.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from kernel_cases import EPS, generator, launch, normed_as_float16, poisoned, relative_error, within
from numpy.typing import NDArray

from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.attention import attend_reference
from numba_atomflow.ops.cuda.layout.weights import (
    PrepackedLayout,
    prepack_fp16_reference,
    prepack_reference,
)
from numba_atomflow.ops.cuda.persistent import publish
from numba_atomflow.ops.cuda.persistent.kernel import PersistentArguments, make_persistent
from numba_atomflow.ops.cuda.persistent.schedule import CTA_THREADS, K_TILE_GROUPS, TABLE_UNIT, PersistentShape
from numba_atomflow.ops.cuda.persistent.trace import EVENTS
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY, token_of
from numba_atomflow.ops.formats import FP8_E4M3, FP16
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups
from numba_atomflow.ops.rms_norm import rms_norm_reference
from numba_atomflow.ops.rope import rope_reference, rope_table
from numba_atomflow.sampling import penalise

Matrix = NDArray[np.float64]

STEPS = 21845  # completed before: with two layers, the 16 bits of a pair's epoch begin at zero with this one
PENALTY = 1.5
RING, COUNTED = 4, 6  # entries of the host ring; tokens posted before
SPARE = 3  # words after each buffer, which nothing may write
KINDS = ("qkv", "attention", "o", "gate_up", "down")
BUFFERS = ("residual", "q", "attn_out", "intermediate", "x_norm", "final_x_norm", "logits")


@dataclass(frozen=True)
class PersistentCase:
    """A model, cut for a chip with so many SMs, with `position` tokens before this one."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    position: int
    layers: int = 1
    vocabulary: int = 40
    sms: int = 1
    stages: int = 7  # of the pipeline: so few that each is used many times
    fp16_head: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def rope_in_attention(self) -> bool:
        return self.qkv_bias or self.qk_norm

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    def layout(self, kind: str) -> PrepackedLayout:
        out_features, in_features, half = {
            "qkv": (self.q_dim + 2 * self.kv_dim, self.hidden, 0 if self.rope_in_attention else self.head_dim // 2),
            "o": (self.hidden, self.q_dim, 0),
            "gate_up": (2 * self.ffn, self.hidden, self.ffn),
            "down": (self.hidden, self.ffn, 0),
            "lm_head": (self.vocabulary, self.hidden, 0),
        }[kind]
        weights = FP16 if self.fp16_head and kind == "lm_head" else FP8_E4M3
        return PrepackedLayout(out_features, in_features, half=half, format=weights, k_tile=K_TILE_GROUPS)

    @cached_property
    def shape(self) -> PersistentShape:
        def cut(shared_bytes: int) -> PersistentShape:
            return PersistentShape(
                layers=self.layers,
                hidden=self.hidden,
                intermediate=self.ffn,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                eps=EPS,
                qkv=self.layout("qkv"),
                o=self.layout("o"),
                gate_up=self.layout("gate_up"),
                down=self.layout("down"),
                lm_head=self.layout("lm_head"),
                embedding=self.layout("lm_head"),
                sms=self.sms,
                shared_bytes=shared_bytes,
                qkv_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
            )

        generous = cut(1 << 20)
        shape = cut((1 << 20) - 4 * (generous.stages - self.stages) * (generous.stage_words + 4))
        assert shape.stages == self.stages
        assert shape.refusal() is None
        return shape


CASES = (
    PersistentCase(64, 128, 2, 1, 64, position=0, layers=2),  # the first token; K padded to one group
    PersistentCase(80, 520, 1, 1, 80, position=131, stages=12, fp16_head=True),  # k-tiles of 4 groups and of 1
    PersistentCase(64, 72, 2, 1, 32, position=5, qkv_bias=True, qk_norm=True),  # heads that attention finishes
)
CASES_OF_MANY_CTAS = (
    PersistentCase(64, 72, 1, 1, 96, position=300, layers=2, sms=3, fp16_head=True),  # three KV splits
    PersistentCase(64, 72, 4, 2, 32, position=290, sms=5),  # two splits per head; a CTA idles
    PersistentCase(80, 520, 1, 1, 32, position=5, layers=2, sms=3),  # the schedule skips a CTA after a layer
    PersistentCase(
        64, 2048, 8, 1, 128, position=5, sms=3
    ),  # 8-row tiles of "o" and "down", which takes two stages for each
)

LARGE_CASES = (  # a minute in the simulator, where they pass as well
    PersistentCase(64, 72, 8, 1, 32, position=240, sms=2, qk_norm=True),  # more heads than warps, two splits
    PersistentCase(64, 72, 4, 4, 64, position=3, layers=2, sms=5, qkv_bias=True),
)


@lru_cache(maxsize=2)
def kernels(shape: PersistentShape) -> tuple[Any, Any]:
    return make_persistent(shape), publish.make_publish(shape)


# --- a model in memory -------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Weights and norms in float64, and as the kernel reads them."""

    case: PersistentCase
    matrices: dict[str, Matrix] = field(default_factory=dict)
    norms: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    words: list[NDArray[np.uint32]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    @classmethod
    def draw(cls, case: PersistentCase, rng: np.random.Generator) -> "Model":
        model = cls(case)
        model.add("embedding", case.layout("lm_head"), rng)
        for layer in range(case.layers):
            for kind in ("qkv", "o", "gate_up", "down"):
                model.add(f"{layer}.{kind}", case.layout(kind), rng)
            for kind in ("qkv", "gate_up"):
                model.add_norm(f"{layer}.{kind}", rng)
            if case.qkv_bias:
                model.add_vector(f"{layer}.bias", rng.standard_normal(case.q_dim + 2 * case.kv_dim))
            for kind in ("q", "k") if case.qk_norm else ():
                model.add_vector(f"{layer}.{kind}", rng.uniform(0.5, 1.5, case.head_dim))
        model.add_norm("lm_head", rng)
        return model

    def add(self, name: str, layout: PrepackedLayout, rng: np.random.Generator) -> None:
        size = layout.out_features, layout.in_features
        values = rng.standard_normal(size) * np.exp2(rng.integers(-1, 2, (layout.out_features, 1)))
        values /= 1.0 if name == "embedding" else np.sqrt(layout.in_features)
        if layout.format.bits == 16:
            stored = values.astype(np.float16)
            self.matrices[name], words = stored.astype(np.float64), prepack_fp16_reference(stored, layout)
        else:
            codes, scales = quantize_groups(values.astype(np.float32))
            self.matrices[name] = dequantize_groups(codes, scales).astype(np.float64)
            words = prepack_reference(codes, scales, layout)
        self._place(name, words)

    def add_norm(self, name: str, rng: np.random.Generator) -> None:
        self.add_vector(name, rng.uniform(0.5, 1.5, self.case.hidden))

    def add_vector(self, name: str, values: Matrix) -> None:
        self.norms[name] = values.astype(np.float32)
        self._place(f"{name}_norm", self.norms[name].view(np.uint32))

    def _place(self, name: str, words: NDArray[np.uint32]) -> None:
        self.places[name] = sum(map(len, self.words)) // TABLE_UNIT
        gap = poisoned(TABLE_UNIT + -len(words) % TABLE_UNIT, dtype=np.uint32)
        self.words += [words, gap]

    @property
    def table(self) -> NDArray[np.int64]:
        entries = [(self.places["embedding"], 0)]
        for layer in range(self.case.layers):
            for kind in KINDS:
                name = f"{layer}.{kind}"
                entries.append((self.places.get(name, 0), self.places.get(f"{name}_norm", 0)))
        entries.append((self.places["embedding"], self.places["lm_head_norm"]))
        vectors = [
            self.places.get(f"{layer}.{kind}_norm", 0)
            for layer in range(self.case.layers if self.case.rope_in_attention else 0)
            for kind in ("bias", "q", "k")
        ]
        return np.concatenate([np.array(entries, np.int64).reshape(-1), np.array(vectors, np.int64)])


class Memory:
    """What a step reads and writes beside the weights."""

    def __init__(self, case: PersistentCase, model: Model, rng: np.random.Generator) -> None:
        self.case, self.model, self.shape = case, model, case.shape
        self.weights = np.concatenate(model.words)
        positions = case.position + 5
        self.cache = rng.standard_normal((case.layers, 2, positions, case.kv_dim)).astype(np.float16)
        self.cache[:, :, case.position :] = np.nan
        self.past = self.cache.copy()
        angles = 10000.0 ** (-np.arange(0, case.head_dim, 2) / case.head_dim)
        self.cosines, self.sines = rope_table(angles, positions)
        self.token = int(rng.integers(case.vocabulary))
        self.tokens = np.array([self.token], np.int32)
        self.stale = self._stale_words()
        self.mailbox = self.stale.copy()
        self.residual = poisoned(case.hidden + SPARE)
        self.q = poisoned(case.q_dim + SPARE, dtype=np.uint16)
        self.attn_out = poisoned(case.q_dim // 2 + SPARE, dtype=np.uint32)
        self.intermediate = poisoned(case.ffn // 2 + SPARE, dtype=np.uint32)
        self.x_norm, self.final_x_norm = (poisoned(case.hidden // 2 + SPARE, dtype=np.uint32) for _ in range(2))
        self.logits = poisoned(case.vocabulary + SPARE)
        self.seen = rng.random(case.vocabulary) < 0.3
        bits = np.packbits(self.seen, bitorder="little")
        self.seen_bits = np.pad(bits, (0, -len(bits) % 4)).view(np.uint32)
        self.ring, self.count = np.zeros(RING, np.uint64), np.array([COUNTED], np.int64)
        self.best, self.fault = np.array([LOWEST_KEY], np.int64), np.zeros(1, np.int32)
        self.steps, self.position = np.array([STEPS, 0], np.int64), np.array([case.position], np.int64)

    @property
    def epoch(self) -> int:
        """Of the embedding; the results of layer i have epoch + i + 1."""
        return STEPS * (self.case.layers + 1) + 1

    def _stale_words(self) -> NDArray[np.uint64]:
        """A mailbox of NaN, of the last layer of the token before."""
        before, places = self.epoch - 1, self.shape.mailbox._asdict()
        words = np.full(places["end"], before << 32 | 0xFFFFFFFF, np.uint64)
        for pairs, exact in (("residual_in", "residual_in_exact"), ("residual_mid", "residual_mid_exact")):
            words[places[pairs] : places[exact]] = (before & 0xFFFF) << 48 | 0xFFFFFFFFFFFF
        return words

    @property
    def kv_stride(self) -> int:
        return self.cache[0, 0].size

    def run(self, first: int, last: int, *, greedy: bool = False) -> None:
        """Ops first .. last - 1."""
        shape = self.shape
        options = np.array([0.0, 0.0, 1.0, 0.0, PENALTY], np.float64)
        cache = self.cache.reshape(-1)
        launch(
            kernels(shape)[0],
            shape.sms,
            CTA_THREADS,
            shape.dynamic_shared_bytes,
            PersistentArguments(
                weights=self.weights,
                table=self.model.table,
                cache16=cache.view(np.uint16),
                cache=self.cache.reshape(-1).copy().view(np.uint32),  # what it writes, it need not read
                mailbox=self.mailbox,
                tokens=self.tokens,
                position=self.position,
                steps=self.steps,
                cosines=self.cosines.reshape(-1),
                sines=self.sines.reshape(-1),
                residual=self.residual,
                x_norm=self.x_norm,
                final_x_norm=self.final_x_norm,
                q=self.q,
                attn_out=self.attn_out,
                intermediate=self.intermediate,
                logits=self.logits,
                seen=self.seen_bits,
                options=options,
                best=self.best,
                token_ring=self.ring,
                tokens_posted=self.count,
                fault=self.fault,
                timestamps=np.zeros(shape.sms * shape.ops * EVENTS, np.int64),
                kv_stride=self.kv_stride,
                first_op=first,
                end_op=last,
                greedy=int(greedy),
            ),
        )

    def publish(self, layer: int) -> None:
        """What lets an op of the layer run by itself."""
        arguments = publish.PublishArguments(
            residual=self.residual,
            q=self.q,
            cache=self.cache.reshape(-1).view(np.uint16),
            attn_out=self.attn_out,
            intermediate=self.intermediate,
            mailbox=self.mailbox,
            position=self.position,
            steps=self.steps,
            kv_stride=self.kv_stride,
            layer=layer,
        )
        launch(kernels(self.shape)[1], 1, publish.THREADS, 0, arguments)

    # --- the views as numbers ------------------------------------------------------------------------------------

    def halves(self, name: str, size: int) -> Matrix:
        view: NDArray[Any] = getattr(self, name)
        return view.view(np.float16)[:size].astype(np.float64)

    @property
    def stream(self) -> NDArray[np.float32]:
        return self.residual[: self.case.hidden].copy()

    def outputs(self) -> dict[str, NDArray[Any]]:
        """Everything that both ways of running a step must leave alike, bit for bit."""
        names = (
            "residual",
            "q",
            "attn_out",
            "intermediate",
            "x_norm",
            "final_x_norm",
            "logits",
            "best",
            "fault",
            "cache",
        )
        return {name: np.ascontiguousarray(getattr(self, name)).view(np.uint8).copy() for name in names}


# --- checks ------------------------------------------------------------------------------------------------------


def check_step(case: PersistentCase) -> None:
    """A whole step, beside float64 with nothing rounded; the mailbox afterwards; and that all stays in bounds."""
    whole_step(case)


def whole_step(case: PersistentCase) -> Memory:
    model = Model.draw(case, generator(case.hidden, case.position))
    whole = Memory(case, model, generator(case.ffn, case.position))
    whole.run(0, whole.shape.ops)
    check_bounds(whole)
    check_mailbox(whole)
    logits, written = step_reference(model, whole)
    within("persistent step", relative_error(whole.logits[: case.vocabulary], logits), 4e-3)
    within("persistent cache", relative_error(whole.cache[:, :, case.position], written), 4e-3)
    best = int(np.argmax(penalise(whole.logits[: case.vocabulary], whole.seen, PENALTY)))
    assert token_of(int(whole.best[0])) == best
    assert whole.steps.tolist() == [STEPS + 1, 0]
    return whole


def check_greedy(case: PersistentCase) -> None:
    """A step that takes the most likely token leaves all as one that does not, and posts the token."""
    model = Model.draw(case, generator(case.hidden, case.position))
    left, taken = (Memory(case, model, generator(case.ffn, case.position)) for _ in range(2))
    left.run(0, left.shape.ops)
    taken.run(0, taken.shape.ops, greedy=True)
    token = int(np.argmax(penalise(left.logits[: case.vocabulary], left.seen, PENALTY)))
    assert taken.tokens.tolist() == [token]
    assert taken.position.tolist() == [case.position + 1]
    assert taken.best.tolist() == [LOWEST_KEY], "ready for the next arg-max"
    assert taken.steps.tolist() == [STEPS + 1, 0]
    assert taken.count.tolist() == [COUNTED + 1]
    assert taken.ring.tolist() == [0, 0, (COUNTED + 1) << 32 | token, 0]
    seen = left.seen.copy()
    seen[token] = True
    np.testing.assert_array_equal(np.unpackbits(taken.seen_bits.view(np.uint8), bitorder="little")[: seen.size], seen)
    assert left.tokens.tolist() == [left.token]
    assert (left.position.tolist(), left.count.tolist(), left.ring.any()) == ([case.position], [COUNTED], False)
    for (name, one), other in zip(left.outputs().items(), taken.outputs().values(), strict=True):
        if name != "best":
            np.testing.assert_array_equal(one, other, err_msg=name)


def check_ops(case: PersistentCase) -> None:
    """A step op by op, each against float64 from what it was given: it leaves the same bits as the whole step."""
    whole = whole_step(case)
    model = whole.model
    alone = Memory(case, model, generator(case.ffn, case.position))
    alone.run(0, 1)
    np.testing.assert_array_equal(alone.stream, model.matrices["embedding"][alone.token].astype(np.float32))
    for layer in range(case.layers):
        for number, check in enumerate((check_qkv, check_attention, check_o, check_gate_up, check_down)):
            before = alone.stream
            alone.publish(layer)
            op = alone.shape.op_index.of_layer(layer, number)
            for ops in alone.shape.launches_of(op):
                alone.run(*ops)
            check(alone, layer, before)
    alone.publish(case.layers)
    alone.run(alone.shape.ops - 1, alone.shape.ops)
    check_logits(alone)
    for (name, one), other in zip(alone.outputs().items(), whole.outputs().values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=f"{name}: op by op, and as one launch")


def cut_24_reference(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to the upper 24 bits, ties away from zero."""
    return ((values.view(np.uint32) + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)


def check_normed(memory: Memory, view: str, norm: str, before: NDArray[np.float32]) -> Matrix:
    """The normalised residual stream, as the kernel reports it."""
    x_norm = memory.halves(view, memory.case.hidden)
    expected, doubt = normed_as_float16(cut_24_reference(before), memory.model.norms[norm])
    slack = float(np.linalg.norm(doubt) / np.linalg.norm(expected))
    within("persistent norm", relative_error(x_norm, expected), 1e-5 + slack)
    return x_norm


def check_qkv(memory: Memory, layer: int, before: NDArray[np.float32]) -> None:
    case = memory.case
    x_norm = check_normed(memory, "x_norm", f"{layer}.qkv", before)
    q, k, v = qkv_reference(memory, layer, x_norm)
    for got, expected in (
        (memory.halves("q", case.q_dim), q),
        (memory.cache[layer, 0, case.position], k),
        (memory.cache[layer, 1, case.position], v),
    ):
        within("persistent q, k, v", relative_error(got, expected), 5e-4)


def qkv_reference(memory: Memory, layer: int, x_norm: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """q, k and v of the token, rotated."""
    case, norms = memory.case, memory.model.norms
    qkv = memory.model.matrices[f"{layer}.qkv"] @ x_norm
    if case.qkv_bias:
        qkv += norms[f"{layer}.bias"]
    q, k, v = np.split(qkv, [case.q_dim, case.q_dim + case.kv_dim])
    if case.qk_norm:
        q, k = (
            rms_norm_reference(x.reshape(-1, case.head_dim), norms[f"{layer}.{kind}"].astype(np.float64), EPS).reshape(
                -1
            )
            for kind, x in (("q", q), ("k", k))
        )
    return rotate(memory, q), rotate(memory, k), v


def rotate(memory: Memory, x: Matrix) -> Matrix:
    row = slice(memory.case.position, memory.case.position + 1)
    angles = memory.cosines[row].astype(np.float64), memory.sines[row].astype(np.float64)
    return rope_reference(x.reshape(1, -1, memory.case.head_dim), *angles).reshape(-1)


def check_attention(memory: Memory, layer: int, before: NDArray[np.float32]) -> None:
    del before
    case = memory.case
    keys, values = memory.cache[layer].astype(np.float64)
    q = memory.halves("q", case.q_dim)[None]
    expected = attend_reference(q, keys, values, case.position, case.head_dim)[0]
    within("persistent attention", relative_error(memory.halves("attn_out", case.q_dim), expected), 1e-3)


def check_o(memory: Memory, layer: int, before: NDArray[np.float32]) -> None:
    added = memory.model.matrices[f"{layer}.o"] @ memory.halves("attn_out", memory.case.q_dim)
    within("persistent sums", relative_error(memory.stream, before + added), 1e-5)


def check_gate_up(memory: Memory, layer: int, before: NDArray[np.float32]) -> None:
    x_norm = check_normed(memory, "x_norm", f"{layer}.gate_up", before)
    gate, up = np.split(memory.model.matrices[f"{layer}.gate_up"] @ x_norm, 2)
    within(
        "persistent SwiGLU",
        relative_error(memory.halves("intermediate", memory.case.ffn), silu_reference(gate) * up),
        5e-4,
    )


def check_down(memory: Memory, layer: int, before: NDArray[np.float32]) -> None:
    added = memory.model.matrices[f"{layer}.down"] @ memory.halves("intermediate", memory.case.ffn)
    within("persistent sums", relative_error(memory.stream, before + added), 1e-5)


def check_logits(memory: Memory) -> None:
    x_norm = check_normed(memory, "final_x_norm", "lm_head", memory.stream)
    logits = memory.logits[: memory.case.vocabulary]
    within("persistent sums", relative_error(logits, memory.model.matrices["embedding"] @ x_norm), 1e-5)
    assert token_of(int(memory.best[0])) == int(np.argmax(penalise(logits, memory.seen, PENALTY)))


def check_bounds(memory: Memory) -> None:
    """Nothing is written beyond a buffer or beside the token's row of the cache, and no watchdog tripped."""
    assert not memory.fault[0]
    for name in BUFFERS:
        view = getattr(memory, name)
        np.testing.assert_array_equal(view[-SPARE:], poisoned(SPARE, dtype=view.dtype), err_msg=name)
        assert np.isfinite(view[:-SPARE].view(np.float16 if view.dtype.kind == "u" else view.dtype)).all(), name
    others = np.arange(memory.cache.shape[2]) != memory.case.position
    np.testing.assert_array_equal(
        memory.cache[:, :, others].view(np.uint16), memory.past[:, :, others].view(np.uint16), err_msg="cache"
    )


def check_mailbox(memory: Memory) -> None:
    """Every word is of the last layer, and agrees with the buffers; padding is unchanged."""
    case, epoch = memory.case, memory.epoch + memory.case.layers
    pairs_of_heads = np.split(memory.q[: case.q_dim], case.heads), *np.split(memory.cache[-1, :, case.position], 2)
    keys, values = (np.split(row.reshape(-1).view(np.uint16), case.kv_heads) for row in pairs_of_heads[1:])
    expected = {
        "residual_in": pairs_reference(memory.stream, epoch),
        "residual_in_exact": words_of(memory.stream.view(np.uint32), epoch),
        "attn_out": words_of(memory.attn_out[:-SPARE], epoch),
        "intermediate": words_of(memory.intermediate[:-SPARE], epoch),
    }
    if case.rope_in_attention:
        sums = memory.mailbox[memory.shape.mailbox.q :][: case.q_dim + 2 * case.kv_dim].astype(np.uint32)
        assert np.isfinite(sums.view(np.float32)).all()
        expected["q"] = words_of(sums, epoch)
    else:
        expected["q"] = words_of(rotated_pairs(pairs_of_heads[0]), epoch)
        expected |= {"k": words_of(rotated_pairs(keys), epoch), "v": words_of(rotated_pairs(values), epoch)}
    places = memory.shape.mailbox._asdict()
    ends = dict(zip(places, [*list(places.values())[1:], None], strict=True))
    for name, words in expected.items():
        buffer, stale = (whole[places[name] : ends[name]] for whole in (memory.mailbox, memory.stale))
        np.testing.assert_array_equal(buffer[: len(words)], words, err_msg=name)
        np.testing.assert_array_equal(buffer[len(words) :], stale[len(words) :], err_msg=f"{name}: wrote beyond it")
    exact = memory.mailbox[places["residual_mid_exact"] : ends["residual_mid_exact"]][: case.hidden]
    assert (exact >> np.uint64(32) == epoch).all()
    middle = (exact & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(
        memory.mailbox[places["residual_mid"] : places["residual_mid"] + case.hidden // 2],
        pairs_reference(middle, epoch),
    )


def words_of(results: NDArray[np.uint32], epoch: int) -> NDArray[np.uint64]:
    return results.astype(np.uint64) | np.uint64(epoch << 32)


def rotated_pairs(heads: list[NDArray[np.uint16]]) -> NDArray[np.uint32]:
    """Elements i and i + head_dim / 2 of each head, in one word."""
    low, high = np.split(np.array(heads).astype(np.uint32), 2, axis=1)
    return (low | high << np.uint32(16)).reshape(-1)


def pairs_reference(values: NDArray[np.float32], epoch: int) -> NDArray[np.uint64]:
    """Pairs of float32 of 24 bits, the first in the lowest bits, and 16 bits of the epoch."""
    cut = (cut_24_reference(values).view(np.uint32) >> np.uint32(8)).astype(np.uint64)
    return cut[::2] | cut[1::2] << np.uint64(24) | np.uint64((epoch & 0xFFFF) << 48)


def step_reference(model: Model, memory: Memory) -> tuple[Matrix, Matrix]:
    """Logits, and the token's rows of the cache [layers, 2, kv_dim], with nothing rounded on the way."""
    case, weights = memory.case, model.matrices
    x, written = weights["embedding"][memory.token].copy(), []
    for layer in range(case.layers):
        x_norm = rms_norm_reference(x, model.norms[f"{layer}.qkv"].astype(np.float64), EPS)
        q, *new = qkv_reference(memory, layer, x_norm)
        written.append(new)
        keys, values = (
            np.vstack([past[: case.position], new])
            for past, new in zip(memory.past[layer].astype(np.float64), written[-1], strict=True)
        )
        attn_out = attend_reference(q[None], keys, values, case.position, case.head_dim)[0]
        x += weights[f"{layer}.o"] @ attn_out
        x_norm = rms_norm_reference(x, model.norms[f"{layer}.gate_up"].astype(np.float64), EPS)
        gate, up = np.split(weights[f"{layer}.gate_up"] @ x_norm, 2)
        x += weights[f"{layer}.down"] @ (silu_reference(gate) * up)
    x_norm = rms_norm_reference(x, model.norms["lm_head"].astype(np.float64), EPS)
    return weights["embedding"] @ x_norm, np.array(written)


def check_watchdog(case: PersistentCase) -> None:
    """An op whose input never arrives ends, reports it, and marks the token as one without logits."""
    model = Model.draw(case, generator(case.hidden))
    memory = Memory(case, model, generator(case.ffn))
    memory.run(memory.shape.ops - 1, memory.shape.ops)
    assert memory.fault[0] == 1
    assert memory.best[0] == NAN_KEY
    assert token_of(NAN_KEY) is None
    assert ~NAN_KEY & 0xFFFFFF == 0, "what is sampled from it must be a row of the embedding: token 0"
    memory.fault[0], memory.best[0] = 0, LOWEST_KEY
    memory.run(memory.shape.ops - 1, memory.shape.ops, greedy=True)
    assert memory.tokens.tolist() == [0]
    assert memory.ring.tolist() == [0, 0, (COUNTED + 1) << 32 | 1 << 31, 0], "the host learns that it is no token"
    memory.position[0], memory.fault[0] = case.position, 0
    memory.run(3, 4)  # o: neither its input nor the residual stream has arrived
    assert memory.fault[0] == 1
