"""State files: what is loaded is what was saved; what is damaged or foreign is refused in a sentence."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.checkpoint.safetensors import file_head
from numba_atomflow.errors import ContextError, DestinationError, OptionError, StateError
from numba_atomflow.state.state_file import is_state_file

PROMPT = [5, 6, 7, 8, 9, 10, 11]
SAMPLED = SamplingParams(max_tokens=6, temperature=1.0, seed=1, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "Grüße 🙂"}, {"role": "assistant", "content": "…"}]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cpu", 64, threads=1) as engine:
        yield engine


@pytest.fixture
def state(engine: Engine, tmp_path: Path) -> Path:
    """A file with `PROMPT`, which the engine holds as well."""
    engine.feed(PROMPT)
    engine.save_state(tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


def test_the_same_tokens_after_loading_as_without(engine: Engine, tmp_path: Path) -> None:
    expected = engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids
    engine.rewind(len(PROMPT))
    engine.save_state(tmp_path / "state.safetensors")
    with Engine.random(tiny_geometry(), "cpu", 32, threads=1) as other:
        other.feed([1, 2, 3])
        assert other.load_state(tmp_path / "state.safetensors") == []
        assert other.token_ids == PROMPT
        assert other.snapshot().keys.tobytes() == engine.snapshot().keys.tobytes()
        generation = other.generate_tokens(PROMPT, SAMPLED).finish()
        assert generation.stats.reused_tokens == len(PROMPT) - 1
        assert generation.token_ids == expected


def test_a_conversation_is_stored_with_it(engine: Engine, tmp_path: Path) -> None:
    engine.feed(PROMPT)
    engine.save_state(tmp_path / "chat.safetensors", MESSAGES)
    assert engine.load_state(tmp_path / "chat.safetensors") == MESSAGES


def test_an_empty_kv_cache_can_be_saved(engine: Engine, tmp_path: Path) -> None:
    engine.save_state(tmp_path / "empty.safetensors")
    engine.feed(PROMPT)
    engine.load_state(tmp_path / "empty.safetensors")
    assert engine.position == 0


def test_the_safetensors_library_reads_it(engine: Engine, state: Path) -> None:
    with safe_open(state, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "numba-atomflow KV cache"
    assert json.loads(metadata["model"])["name"] == "random"
    tensors = safetensors.numpy.load_file(state)
    assert tensors["token_ids"].tolist() == PROMPT
    snapshot = engine.snapshot()
    assert (tensors["keys"] == snapshot.keys).all()
    assert (tensors["values"] == snapshot.values).all()
    assert is_state_file(state)


def test_a_state_file_is_told_from_text(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps({"messages": MESSAGES}))
    assert not is_state_file(tmp_path / "chat.json")
    assert not is_state_file(tmp_path / "missing")


def test_progress_reaches_the_end(engine: Engine, state: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, total: int) -> None:
        seen.setdefault(what, []).append((done, total))

    engine.save_state(tmp_path / "other.safetensors", progress=progress)
    engine.load_state(state, progress)
    assert sorted(seen) == ["checking", "hashing", "writing"]
    total = engine.snapshot().nbytes + 4 * len(PROMPT)
    assert seen["writing"][0] == (0, total)
    assert seen["writing"][-1] == (total, total)


# --- the destination ------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_only_on_request(engine: Engine, state: Path) -> None:
    before = state.read_bytes()
    engine.rewind(2)
    with pytest.raises(DestinationError, match="exists"):
        engine.save_state(state)
    assert state.read_bytes() == before
    engine.save_state(state, overwrite=True)
    engine.load_state(state)
    assert engine.position == 2


def test_a_destination_that_cannot_be_is_refused_with_a_sentence(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="There is no folder"):
        engine.save_state(tmp_path / "nowhere" / "state.safetensors")
    with pytest.raises(DestinationError, match="is a folder"):
        engine.save_state(tmp_path, overwrite=True)
    with pytest.raises(DestinationError, match="File name too long"):
        engine.save_state(tmp_path / ("a" * 300))
    with pytest.raises(DestinationError, match="is a device or a pipe"):
        engine.save_state("/dev/null", overwrite=True)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DestinationError, match="Too many levels"):
        engine.save_state(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    with pytest.raises(DestinationError, match="exists"):
        engine.save_state(tmp_path / "dangling")
    with pytest.raises(OptionError, match="path is 7"):
        engine.save_state(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("phase", ["hashing", "writing"])
def test_ctrl_c_leaves_no_file(engine: Engine, tmp_path: Path, phase: str) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == phase and done:
            raise KeyboardInterrupt

    engine.feed(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        engine.save_state(tmp_path / "state.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert engine.token_ids == PROMPT


def test_ctrl_c_while_loading_changes_nothing(engine: Engine, state: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    engine.rewind(3)
    with pytest.raises(KeyboardInterrupt):
        engine.load_state(state, interrupt)
    assert engine.token_ids == PROMPT[:3]


# --- what is refused ------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Change the tensors and the metadata of a file."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata)


REFUSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], None], str]] = {
    "another format": (lambda _, m: m.update(format="x"), "is not a KV cache saved by this program"),
    "another version": (lambda _, m: m.update(format_version="2"), "has format version '2', this program reads"),
    "no JSON": (lambda _, m: m.update(model="{"), "model record .* is not JSON"),
    "no model": (lambda _, m: m.update(model="[]"), "has no name and fingerprint"),
    "another model": (lambda _, m: m.update(model='{"name": "a", "fingerprint": "b"}'), r"another model \(a\)"),
    "another digest": (lambda _, m: m.update(sha256="00"), "is damaged: its contents"),
    "other contents": (lambda t, _: t["keys"].fill(0), "is damaged: its contents"),
    "no tokens": (lambda t, _: t.pop("token_ids"), "lacks the tensor token_ids"),
    "an unknown tensor": (lambda t, _: t.update(x=t["keys"]), "holds an unknown tensor x"),
    "another dtype": (lambda t, _: t.update(token_ids=t["token_ids"].astype(np.int64)), "is I64 .* not I32"),
    "other dimensions": (lambda t, _: t.update(keys=t["keys"][0]), "not F32 or F16 of 4 dimensions"),
    "another shape": (lambda t, _: t.update(keys=t["keys"][:, :3]), r"has keys of float32 \[2, 3, 2, 64\]"),
    "a GPU's": (
        lambda t, _: t.update(keys=t["keys"].astype(np.float16), values=t["values"].astype(np.float16)),
        "in float16, but the cpu backend keeps float32",
    ),
    "a token beyond the vocabulary": (lambda t, _: t["token_ids"].fill(10**6), "has the token 1000000"),
}


def test_more_tokens_than_any_model_takes_are_not_read(engine: Engine, state: Path) -> None:
    with safe_open(state, "numpy") as file:
        metadata = file.metadata()
    tokens = 1 << 27
    shape = (2, 0, 2, 64)
    head = file_head({"keys": ("F32", shape), "values": ("F32", shape), "token_ids": ("I32", (tokens,))}, metadata)
    with state.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 4 * tokens)  # a sparse file, which takes no space
    with pytest.raises(StateError, match=r"token_ids .* has 536870912 bytes, too many"):
        engine.load_state(state)


@pytest.mark.parametrize("case", REFUSED)
def test_a_foreign_or_damaged_file_is_refused_and_changes_nothing(engine: Engine, state: Path, case: str) -> None:
    change, sentence = REFUSED[case]
    rewritten(state, change)
    engine.rewind(3)
    with pytest.raises(StateError, match=sentence) as error:
        engine.load_state(state)
    assert str(state) in str(error.value)
    assert engine.token_ids == PROMPT[:3]


def test_values_that_are_not_finite_are_refused(engine: Engine, tmp_path: Path) -> None:
    engine.feed(PROMPT)
    snapshot = engine.snapshot()
    snapshot.values[1, 0, 0, 0] = np.nan
    engine.restore(snapshot)
    engine.save_state(tmp_path / "state.safetensors")
    with pytest.raises(StateError, match=r"values in .* hold a NaN"):
        engine.load_state(tmp_path / "state.safetensors")


def test_a_conversation_that_is_none_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.save_state(tmp_path / "state.safetensors", ["not a message"])  # type: ignore[list-item]
    with pytest.raises(StateError, match="is no list of messages"):
        engine.load_state(tmp_path / "state.safetensors")
    with pytest.raises(OptionError, match="messages cannot be stored"):
        engine.save_state(tmp_path / "other.safetensors", [{"content": object()}])
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(engine: Engine, state: Path, size: int) -> None:
    state.write_bytes(state.read_bytes()[:size])
    with pytest.raises(StateError, match="truncated"):
        engine.load_state(state)


def test_a_missing_file_and_a_longer_one_are_refused(engine: Engine, state: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        engine.load_state(tmp_path / "missing")
    with (
        Engine.random(tiny_geometry(), "cpu", 6, threads=1) as small,
        pytest.raises(ContextError, match=r"has 7 tokens, but the context holds 6; raise --max-seq-len"),
    ):
        small.load_state(state)


def test_a_file_that_changes_while_it_is_loaded_is_refused(engine: Engine, state: Path) -> None:
    def change(what: str, done: int, total: int) -> None:
        if done == 0:
            with state.open("ab") as file:
                file.write(b"x")

    with pytest.raises(StateError, match="was changed by another program"):
        engine.load_state(state, change)
    assert engine.token_ids == PROMPT
