"""Snapshots of the KV cache: an engine continues from one as if it had computed the prompt itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler
from tiny_models import tiny_geometry, write_hf_folder

from numba_atomflow import Engine, KvSnapshot, SamplingParams
from numba_atomflow.checkpoint.fingerprint import identify
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import ClosedError, ContextError, OptionError, StateError

PROMPT, OTHER = [5, 6, 7, 8, 9, 10, 11], [50, 40, 30]
SAMPLED = SamplingParams(max_tokens=6, temperature=1.0, seed=1, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cpu", 64, threads=1) as engine:
        yield engine


def logits_after(engine: Engine, tokens: list[int]) -> bytes:
    return engine.feed(tokens).tobytes()


def test_the_next_tokens_are_those_that_followed(engine: Engine) -> None:
    engine.feed(PROMPT)
    snapshot = engine.snapshot()
    assert snapshot.token_ids == tuple(PROMPT)
    assert snapshot.keys.shape == snapshot.values.shape == (2, len(PROMPT), 2, 64)
    assert snapshot.nbytes == 2 * snapshot.keys.nbytes == 2 * 2 * len(PROMPT) * 128 * 4
    expected = logits_after(engine, [1])
    engine.reset()
    engine.feed(OTHER)  # shorter than the snapshot
    engine.restore(snapshot)
    assert engine.token_ids == PROMPT
    assert logits_after(engine, [1]) == expected
    engine.feed([2] * 20)  # longer
    engine.restore(snapshot)
    assert logits_after(engine, [1]) == expected


def test_another_engine_of_the_same_model_may_restore_it(engine: Engine) -> None:
    expected = engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids
    snapshot = engine.snapshot()
    assert len(snapshot.token_ids) == len(PROMPT) + len(expected) - 1  # the last one was never fed
    with Engine.random(tiny_geometry(), "cpu", 32, threads=1) as other:
        other.restore(snapshot)
        generation = other.generate_tokens(PROMPT, SAMPLED).finish()
        assert generation.stats.reused_tokens == len(PROMPT) - 1
        assert generation.token_ids == expected


def test_a_prefix_of_a_snapshot(engine: Engine) -> None:
    engine.feed(PROMPT)
    snapshot = engine.snapshot()
    engine.rewind(3)
    expected = logits_after(engine, OTHER)
    engine.restore(snapshot.prefix(3))
    assert engine.token_ids == PROMPT[:3]
    assert logits_after(engine, OTHER) == expected
    engine.restore(snapshot.prefix(0))
    assert engine.position == 0
    with pytest.raises(ContextError, match="no prefix of 8"):
        snapshot.prefix(8)


def test_an_empty_snapshot(engine: Engine) -> None:
    snapshot = engine.snapshot()
    engine.feed(PROMPT)
    engine.restore(snapshot)
    assert (engine.position, snapshot.nbytes) == (0, 0)


def test_a_snapshot_is_a_copy_and_what_is_changed_in_it_is_restored(engine: Engine) -> None:
    engine.feed(PROMPT)
    before = engine.snapshot()
    snapshot = engine.snapshot()
    snapshot.values[1, 2:] = 0
    assert engine.snapshot().values.tobytes() == before.values.tobytes()
    engine.restore(snapshot)
    again = engine.snapshot()
    assert again.values.tobytes() == snapshot.values.tobytes()
    assert again.keys.tobytes() == before.keys.tobytes()


def test_a_generation_goes_on_after_a_snapshot_and_ends_at_a_restore(engine: Engine) -> None:
    expected = engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids
    engine.reset()
    generation = engine.generate_tokens(PROMPT, SAMPLED)
    tokens = [next(generation), next(generation)]
    snapshot = engine.snapshot()
    assert snapshot.token_ids == (*PROMPT, tokens[0])
    assert [*tokens, *generation] == expected
    generation = engine.generate_tokens(PROMPT, SAMPLED)
    next(generation)
    engine.restore(snapshot)
    assert generation.finish_reason == "interrupted"


@pytest.mark.parametrize("changes", [{"rope_theta": 500000.0}, {"layers": 1}])
def test_another_geometry_is_refused(engine: Engine, changes: dict[str, float]) -> None:
    engine.feed(PROMPT)
    snapshot = engine.snapshot()
    with Engine.random(tiny_geometry(**changes), "cpu", 64, threads=1, name="other") as other:
        with pytest.raises(StateError, match=r"another model \(random\) than other"):
            other.restore(snapshot)
        assert other.position == 0


def test_what_does_not_fit_is_refused_and_changes_nothing(engine: Engine) -> None:
    engine.feed(PROMPT)
    snapshot = engine.snapshot()
    half = replace(snapshot, keys=snapshot.keys.astype(np.float16), values=snapshot.values.astype(np.float16))
    refused: dict[str, KvSnapshot] = {
        "in float16, but the cpu backend keeps float32": half,
        "has values of float16": replace(snapshot, values=half.values),
        r"has keys of float32 \[2, 3, 2, 64\]": replace(snapshot, keys=snapshot.keys[:, :3]),
        "has the token 1000000": replace(snapshot, token_ids=(*PROMPT[:-1], 10**6)),
    }
    for message, wrong in refused.items():
        with pytest.raises(StateError, match=message):
            engine.restore(wrong)
        assert engine.token_ids == PROMPT
    with Engine.random(tiny_geometry(), "cpu", 6, threads=1) as small, pytest.raises(ContextError, match="has 7 token"):
        small.restore(snapshot)
    with pytest.raises(OptionError, match="snapshot is 7"):
        engine.restore(7)  # type: ignore[arg-type]


def test_a_closed_engine_has_no_snapshot() -> None:
    with Engine.random(tiny_geometry(), "cpu", 64, threads=1) as engine:
        snapshot = engine.snapshot()
    with pytest.raises(ClosedError):
        engine.snapshot()
    with pytest.raises(ClosedError):
        engine.restore(snapshot)


# --- the identity of a model ----------------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_the_weights_and_not_on_the_name(tmp_path: Path) -> None:
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        write_hf_folder(tmp_path / name, seed=seed)
        convert(tmp_path / name, tmp_path / f"{name}.safetensors")
    a, b, c = (identified(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b != c


def test_a_fingerprint_does_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf")
    first = identified(convert(tmp_path / "hf", tmp_path / "first.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    without = convert(tmp_path / "hf", tmp_path / "second.safetensors", warn=lambda _: None)
    assert identified(without) == first


def identified(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return identify(checkpoint).fingerprint


# --- on a pretended GPU, whose kernels do nothing -------------------------------------------------------------------


def test_a_gpu_copies_a_range_of_rows_of_each_layer(
    pretended: PretendedDriver, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")
    pretend_compiler(monkeypatch)
    rng = np.random.default_rng(0)
    with Engine.random(tiny_geometry(), "cuda", 64) as gpu:
        empty = gpu.snapshot()
        shape = (2, len(PROMPT), 2, 64)
        keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
        snapshot = replace(empty, token_ids=tuple(PROMPT), keys=keys, values=values)
        copies = []
        for part in (snapshot.prefix(1), snapshot.prefix(2), snapshot):
            first = len(pretended.calls)
            gpu.restore(part)
            copies.append(pretended.calls[first:].count("cuMemcpyHtoDAsync"))
        assert copies[1] == copies[2]  # not one for each token
        assert gpu.token_ids == PROMPT
        first = len(pretended.calls)
        again = gpu.snapshot()
        assert pretended.calls[first:].count("cuMemcpyDtoH") == 2 * 2
        assert (again.keys.tobytes(), again.values.tobytes()) == (keys.tobytes(), values.tobytes())
        with pytest.raises(StateError, match="in float16, but the cpu backend keeps float32"):
            engine.restore(snapshot)
