"""Prologues of a GEMV: x into shared memory, as float16 pairs with every token's row padded to whole groups.

Copy: x is float16 in device memory. Norm: x is the RMSNorm of the float32 residual, computed by every CTA. Round: x is
the residual itself, of models without these norms.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan
from numba_atomflow.ops.cuda.scalars import f32, u32

_ZERO, _ONE = f32(0.0), f32(1.0)

_LOADS_AT_ONCE = 4  # of x (and of the norm weight) between warp barriers: with more, the first weights would spill


class Prologue(NamedTuple):
    """Device functions that read the kernel's arguments `io`.

    Attributes:
        prefetch: (io, thread): prefetch what no kernel of the step writes; runs while the kernel before still does.
        stage: (io, thread, words, floats): x into shared memory, of which both are views. A barrier follows.
        report: (io, thread, words): what was staged to device memory, behind loads of weights that are in flight.
    """

    prefetch: Any
    stage: Any
    report: Any


@ptx.device_function
def _no_prefetch(io, thread):
    """Nothing that the prologue reads was written before this step."""


@ptx.device_function
def _no_report(io, thread, words):
    """x is in device memory already."""


@dataclass(frozen=True)
class _Teams:
    """Every token belongs to a team of warps; with fewer warps than tokens, teams take turns."""

    plan: GemvPlan

    @property
    def threads(self) -> int:
        """Threads of a team."""
        return 32 * max(1, self.plan.warps // self.plan.tokens)

    @property
    def count(self) -> int:
        """Teams of a CTA."""
        return self.plan.threads // self.threads

    @property
    def turns(self) -> int:
        """Tokens of a team, one after the other."""
        return -(-self.plan.tokens // self.count)

    @property
    def uniform(self) -> bool:
        """Whether every thread has a token in every turn."""
        return self.plan.tokens * self.threads == self.turns * self.plan.threads


# --- copy ------------------------------------------------------------------------------------------------------------


def make_copy_prologue(plan: GemvPlan) -> Prologue:
    """Copy `io.x`, float16 [tokens, padded K] as uint32 words, whose padding is finite."""
    teams = _Teams(plan)
    team, team_count, turns, uniform = teams.threads, teams.count, teams.turns, teams.uniform
    tokens, x_words, x_pitch = plan.tokens, plan.x_words, plan.x_pitch
    vectors = -(-x_words // (4 * team))  # of 16 bytes, per thread
    all_full = x_words == vectors * 4 * team

    @ptx.device_function
    def stage(io, thread, words, floats):
        member = thread % team
        for turn in range(turns):
            token = turn * team_count + thread // team
            if uniform or token < tokens:
                for i in range(vectors):
                    word = (i * team + member) * 4
                    if all_full or word < x_words:
                        a, b, c, d = ptx.load_16(io.x, token * x_words + word)
                        ptx.store_shared_16(words, token * x_pitch + word, a, b, c, d)

    return Prologue(_no_prefetch, stage, _no_report)


# --- round -----------------------------------------------------------------------------------------------------------


def make_round_prologue(plan: GemvPlan) -> Prologue:
    """Round `io.residual`, float32 [tokens, K] as uint32 words with even K, to float16."""
    tokens, threads, in_features = plan.tokens, plan.threads, plan.in_features
    x_words, x_pitch = plan.x_words, plan.x_pitch
    pairs_per_thread = -(-x_words // threads)

    @ptx.device_function
    def stage(io, thread, words, floats):
        for token in range(tokens):
            for i in range(pairs_per_thread):
                pair = i * threads + thread
                if 2 * pair < in_features:
                    low, high = ptx.load_f32x2(io.residual, token * in_features + 2 * pair)
                    words[token * x_pitch + pair] = ptx.pack_f16x2(low, high)
                elif pair < x_words:
                    words[token * x_pitch + pair] = u32(0)

    return Prologue(_no_prefetch, stage, _no_report)


# --- norm ------------------------------------------------------------------------------------------------------------


def make_norm_prologue(plan: GemvPlan, eps: float) -> Prologue:
    """RMSNorm of `io.residual`, float32 [tokens, K] as uint32 words with even K, times `io.norm_weight` float32 [K].

    The last CTAs also write x to `io.x_norm`, a token each, pairs of float16 [tokens, padded K]: so a validator sees
    the inside of the running kernel.
    """
    stage = _make_norm_of_one(plan, eps) if plan.tokens == 1 else _make_norm_by_teams(plan, eps)
    return Prologue(_make_prefetch(plan), stage, _make_report(plan))


def _make_prefetch(plan: GemvPlan) -> Any:
    threads, in_features = plan.threads, plan.in_features
    lines = -(-in_features // (32 * threads))  # of 128 bytes, per thread

    @ptx.device_function
    def prefetch(io, thread):
        """The norm's weight was last read a step ago: L2 has lost it."""
        for i in range(lines):
            k = (i * threads + thread) * 32
            if k < in_features:
                ptx.prefetch_l2(io.norm_weight, k)

    return prefetch


def _make_norm_of_one(plan: GemvPlan, eps: float) -> Any:
    """The norm of the only token, by all threads of the CTA."""
    warps, threads, in_features, x_words = plan.warps, plan.threads, plan.in_features, plan.x_words
    squares_start, pairs_per_thread = plan.squares_start, -(-x_words // threads)
    inverse_width, epsilon = f32(1.0 / in_features), f32(eps)

    @ptx.device_function
    def stage(io, thread, words, floats):
        squares = _ZERO
        for i in range(pairs_per_thread):
            pair = i * threads + thread
            if 2 * pair < in_features:
                a, b = ptx.load_8(io.residual, 2 * pair)
                low, high = ptx.bits_f32(a), ptx.bits_f32(b)
                squares += low * low + high * high
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            floats[squares_start + (thread >> 5)] = squares
        cuda.syncthreads()
        squares = _ZERO
        for warp in range(warps):
            squares += floats[squares_start + warp]
        factor = _ONE / f32(math.sqrt(squares * inverse_width + epsilon))
        for i in range(pairs_per_thread):
            pair = i * threads + thread
            if 2 * pair < in_features:
                a, b = ptx.load_8(io.residual, 2 * pair)
                low = ptx.bits_f32(a) * factor * io.norm_weight[2 * pair]
                high = ptx.bits_f32(b) * factor * io.norm_weight[2 * pair + 1]
                words[pair] = ptx.pack_f16x2(low, high)
            elif pair < x_words:
                words[pair] = u32(0)

    return stage


def _make_norm_by_teams(plan: GemvPlan, eps: float) -> Any:
    """The norm of every token by its team, one reduction each. The second read of the residual comes from L1."""
    teams = _Teams(plan)
    team, team_count, turns, uniform = teams.threads, teams.count, teams.turns, teams.uniform
    tokens, in_features, x_words, x_pitch = plan.tokens, plan.in_features, plan.x_words, plan.x_pitch
    squares_start = plan.squares_start
    inverse_width, epsilon = f32(1.0 / in_features), f32(eps)
    vector = 4 if in_features % 4 == 0 else 2  # elements of a load
    vectors = -(-2 * x_words // (vector * team))  # per thread
    all_full = in_features == vectors * vector * team

    @ptx.device_function
    def sum_squares(residual, token, member):
        """A thread's part of a token's sum of squares."""
        squares = _ZERO
        for i in range(vectors):
            k = (i * team + member) * vector
            if all_full or k < in_features:
                if vector == 4:
                    a, b, c, d = ptx.load_f32x4(residual, token * in_features + k)
                    squares += a * a + b * b + (c * c + d * d)
                else:
                    a, b = ptx.load_f32x2(residual, token * in_features + k)
                    squares += a * a + b * b
        return squares

    @ptx.device_function
    def scale(residual, norm_weight, token, member, active, factor, words):
        """A thread's part of a token times factor and weight, as float16 into shared memory, padding included."""
        for i in range(vectors):
            if i > 0 and i % _LOADS_AT_ONCE == 0:
                ptx.sync_warp()
            k = (i * team + member) * vector
            word = token * x_pitch + k // 2
            if (uniform or active) and (all_full or k < in_features):
                if vector == 4:
                    a, b, c, d = ptx.load_f32x4(residual, token * in_features + k)
                    e, f, g, h = ptx.load_f32x4(norm_weight, k)
                    low = ptx.pack_f16x2(a * factor * e, b * factor * f)
                    high = ptx.pack_f16x2(c * factor * g, d * factor * h)
                    ptx.store_shared_8(words, word, low, high)
                else:
                    a, b = ptx.load_f32x2(residual, token * in_features + k)
                    e, f = ptx.load_f32x2(norm_weight, k)
                    words[word] = ptx.pack_f16x2(a * factor * e, b * factor * f)
            elif (uniform or active) and not all_full and k < 2 * x_words:
                for j in range(vector // 2):
                    words[word + j] = u32(0)

    @ptx.device_function
    def stage(io, thread, words, floats):
        member = thread % team
        for turn in range(turns):
            token = turn * team_count + thread // team
            active = uniform or token < tokens
            squares = sum_squares(io.residual, token, member) if active else _ZERO
            squares = ptx.warp_sum(squares)
            if team > 32:  # then there is one turn only
                if thread & 31 == 0:
                    floats[squares_start + (thread >> 5)] = squares
                cuda.syncthreads()
                squares = _ZERO
                for i in range(team // 32):
                    squares += floats[squares_start + thread // team * (team // 32) + i]
            # Not 1 / sqrt: the exact ones are subroutines, around which weights in flight would be spilled.
            factor = ptx.rsqrt(squares * inverse_width + epsilon)
            scale(io.residual, io.norm_weight, token, member, active, factor, words)

    return stage


def _make_report(plan: GemvPlan) -> Any:
    tokens, threads, in_features = plan.tokens, plan.threads, plan.in_features
    x_words, x_pitch = plan.x_words, plan.x_pitch
    pairs_per_thread = -(-x_words // threads)

    @ptx.device_function
    def report(io, thread, words):
        """Each of the last CTAs writes one token, so that none of them has to write all."""
        for token in range(tokens):
            if cuda.blockIdx.x == max(cuda.gridDim.x - 1 - token, 0):
                for i in range(pairs_per_thread):
                    pair = i * threads + thread
                    if 2 * pair < in_features:
                        io.x_norm[token * x_words + pair] = words[token * x_pitch + pair]

    return report
