"""The engine on tiny models: how replies end, what the KV cache keeps, what is refused."""

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import relative_l2
from tiny_models import SMALLEST_VOCABULARY, random_weights, tiny_geometry, tiny_tokenizer, write_hf_folder, write_json
from toy_tokenizers import sentencepiece

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.context import choose_max_seq_len
from numba_atomflow.convert import convert
from numba_atomflow.errors import BackendError, CheckpointError, ContextError, OptionError, SourceWarning, TextError
from numba_atomflow.ops.arguments import bind
from numba_atomflow.ops.projection import GEMV_TOKENS
from numba_atomflow.sampling import Speculate

BOS, EOS, PAD = 0, 1, 2
SCRIPT = "abcdefgé д😀XYZ"  # no byte twice; the last one is followed by the end of the sequence
MAX_POSITIONS = 1024


def byte_ids(text: str) -> list[int]:
    return tiny_tokenizer().encode(text).ids


@pytest.fixture(scope="session")
def scripted_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says `SCRIPT`: its layers add nothing, a vocabulary row is the embedding of the byte before it."""
    geometry = tiny_geometry(vocabulary=SMALLEST_VOCABULARY, max_positions=MAX_POSITIONS)
    weights = random_weights(geometry)
    for name, values in weights.items():
        if "o_proj" in name or "down_proj" in name:
            values[:] = 0
    weights["model.norm.weight"][:] = 1
    head = np.zeros_like(weights["lm_head.weight"])
    for token, following in pairwise([*byte_ids(SCRIPT), EOS, PAD]):
        head[following] = weights["model.embed_tokens.weight"][token]
    weights["lm_head.weight"] = head
    folder = tmp_path_factory.mktemp("scripted")
    write_hf_folder(folder / "hf", geometry, weights=weights)
    return convert(folder / "hf", folder / "scripted.safetensors")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    write_hf_folder(folder / "hf", tiny_geometry(vocabulary=SMALLEST_VOCABULARY, max_positions=MAX_POSITIONS))
    return convert(folder / "hf", folder / "random.safetensors")


@pytest.fixture
def scripted(scripted_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(scripted_checkpoint, max_seq_len=64, threads=1) as engine:  # too small to be worth two
        yield engine


@pytest.fixture
def engine(random_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(random_checkpoint, threads=1) as engine:
        yield engine


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, SMALLEST_VOCABULARY, count).tolist()


# --- how a reply ends --------------------------------------------------------------------------------------------


def test_a_reply_ends_with_the_end_of_the_sequence(scripted: Engine) -> None:
    reply = scripted.generate("a").finish()
    assert reply.finish_reason == "eos"
    assert reply.text == SCRIPT[1:]
    assert reply.token_ids == [*byte_ids(SCRIPT[1:]), EOS]
    assert reply.stats.tokens == len(reply.token_ids)
    assert reply.stats.prompt_tokens == 1
    assert reply.stats.ttft > 0
    assert reply.stats.tokens_per_second == pytest.approx(1 / reply.stats.tpot)


def test_an_ignored_end_of_the_sequence_is_a_token_like_any_other(scripted: Engine) -> None:
    reply = scripted.generate("Y", SamplingParams(ignore_eos=True, max_tokens=3)).finish()
    assert reply.token_ids == [*byte_ids("Z"), EOS, PAD]
    assert reply.text == "Z"
    assert reply.finish_reason == "max_tokens"


def test_any_of_several_end_tokens_ends_a_reply(scripted_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.symlink_to(scripted_checkpoint.parent / "hf")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    (copy / "generation_config.json").unlink()
    write_json(copy / "generation_config.json", {"eos_token_id": [EOS, byte_ids("d")[0]]})
    with Engine.load(convert(copy, tmp_path / "two.safetensors"), max_seq_len=64) as engine:
        reply = engine.generate("a").finish()
        assert (reply.text, reply.finish_reason) == ("bc", "eos")


@pytest.mark.parametrize("most", [1, 2, 5])
def test_max_tokens_ends_a_reply(scripted: Engine, most: int) -> None:
    reply = scripted.generate("a", SamplingParams(max_tokens=most)).finish()
    assert (reply.text, reply.finish_reason, reply.stats.tokens) == (SCRIPT[1 : 1 + most], "max_tokens", most)


@pytest.mark.parametrize(
    ("stop", "text"),
    [(["def"], "bc"), (["b"], ""), (["gé"], "bcdef"), (["zzz", "ef", "cd"], "b"), (["dex", "fg"], "bcde")],
)
def test_a_stop_string_ends_a_reply_and_is_not_shown(scripted: Engine, stop: list[str], text: str) -> None:
    generation = scripted.generate("a", SamplingParams(stop=stop))
    pieces = list(generation)
    assert "".join(pieces) == generation.text == text
    assert generation.finish_reason == "stop"
    assert generation.stats.tokens > len(text)


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["<|eos|>"], SCRIPT[1:]),
        (["Z<|eos|>"], SCRIPT[1:-1]),
        (["eos"], SCRIPT[1:]),
        (["<|eos|><|pad|>", "YZ<|eo"], SCRIPT[1:-2]),
        (["XYZ<|pad|>", "<|eos|>"], SCRIPT[1:]),
    ],
)
def test_a_stop_string_may_spell_a_special_token(
    scripted: Engine, stop: list[str], text: str, ignore_eos: bool
) -> None:
    """As in transformers, where the text that is searched holds them; they are not shown all the same."""
    reply = scripted.generate("a", SamplingParams(stop=stop, ignore_eos=ignore_eos, max_tokens=40)).finish()
    assert (reply.text, reply.finish_reason) == (text, "stop")
    assert reply.token_ids[-1] == EOS


def test_a_special_token_between_two_texts_keeps_them_apart(scripted: Engine) -> None:
    params = SamplingParams(stop=["XYZ<|pad|>", "<|eos|>X"], ignore_eos=True, max_tokens=40)
    reply = scripted.generate("a", params).finish()
    assert reply.text.startswith(SCRIPT[1:])
    assert "<|" not in reply.text


def test_a_stop_string_that_does_not_come_takes_nothing_away(scripted: Engine) -> None:
    reply = scripted.generate("a", SamplingParams(stop=["cde!", "XYZ!"])).finish()
    assert (reply.text, reply.finish_reason) == (SCRIPT[1:], "eos")


def test_pieces_are_whole_characters(scripted: Engine) -> None:
    pieces = list(scripted.generate("a"))
    assert "".join(pieces) == SCRIPT[1:]
    assert set(pieces) == set(SCRIPT[1:])  # tokens are bytes here: nothing is shown before a character is complete


def test_a_step_is_one_token_also_where_it_completes_no_character(scripted: Engine) -> None:
    reply = scripted.generate("a")
    pieces = []
    for count in range(1, len(SCRIPT.encode())):
        pieces.append(reply.step())
        assert len(reply.token_ids) == count
    assert "" in pieces
    assert "".join(pieces) == SCRIPT[1:] == reply.text
    assert list(reply) == []
    with pytest.raises(StopIteration):
        reply.step()


def test_half_a_character_at_the_end_is_marked(scripted: Engine) -> None:
    reply = scripted.generate("f", SamplingParams(max_tokens=2)).finish()
    assert (reply.text, reply.finish_reason) == ("g�", "max_tokens")


@pytest.mark.parametrize(
    ("limit", "prompt", "text"), [(8, "ab", "cdefgé"), (8, "abc", "defgé"), (4, "abcd", "e"), (1, "a", "b")]
)
def test_a_full_context_ends_a_reply(scripted_checkpoint: Path, limit: int, prompt: str, text: str) -> None:
    """The token that is sampled at the last position is still part of the text."""
    with Engine.load(scripted_checkpoint, max_seq_len=limit) as engine:
        reply = engine.generate(prompt).finish()
        assert reply.finish_reason == "context"
        assert engine.position == limit
        assert len(reply.token_ids) == limit - len(prompt) + 1
        assert reply.text.rstrip("�") == text.encode()[: len(reply.token_ids)].decode(errors="ignore")
        again = engine.generate(prompt).finish()
        assert (again.text, again.finish_reason) == (reply.text, "context")
        with pytest.raises(ContextError, match=f"holds {limit}, of which {limit} are taken"):
            engine.feed([5])


def test_a_reply_can_be_interrupted_and_taken_up(scripted: Engine) -> None:
    generation = scripted.generate("ab")
    assert [next(generation), next(generation)] == ["c", "d"]
    generation.close()
    assert (generation.finish_reason, generation.text, list(generation)) == ("interrupted", "cd", [])
    assert scripted.token_ids == byte_ids("abc")  # the last token was shown, but never fed
    reply = scripted.generate("abcd", SamplingParams(max_tokens=2)).finish()
    assert (reply.text, reply.stats.reused_tokens, reply.stats.prompt_tokens) == ("ef", 3, 4)


def test_closing_a_finished_reply_changes_nothing(scripted: Engine) -> None:
    reply = scripted.generate("X").finish()
    reply.close()
    assert (reply.finish_reason, reply.text) == ("eos", "YZ")


@pytest.mark.parametrize("max_tokens", [8, 9, 10])
def test_a_step_may_sample_several_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    """A backend whose decode step samples two tokens; the end may fall between them."""
    prompt, params = some_tokens(12), SamplingParams(max_tokens=max_tokens, ignore_eos=True, speculate="off")
    expected = engine.generate_tokens(prompt, params).finish().token_ids
    engine.reset()
    decode, sampled_tokens, pair = engine.backend.decode, engine.backend.sampled_tokens, list[int]()

    def decode_twice() -> None:
        pair.clear()
        for _ in range(2):
            decode()
            pair.extend(sampled_tokens())

    monkeypatch.setattr(engine.backend, "decode", decode_twice)
    monkeypatch.setattr(engine.backend, "sampled_tokens", lambda: tuple(pair) or sampled_tokens())
    generation = engine.generate_tokens(prompt, params).finish()
    assert generation.token_ids == expected
    assert generation.stats.tokens == max_tokens
    assert engine.token_ids == prompt + expected[:-1]
    monkeypatch.undo()
    again = engine.generate_tokens(engine.token_ids, SamplingParams(max_tokens=1, ignore_eos=True)).finish()
    assert again.token_ids == expected[-1:]


def test_after_a_warm_up_no_prompt_needs_another_kernel(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[Callable[..., object]] = []

    def recorded(kernel: Callable[..., object], *arguments: Any) -> Any:
        kernels.append(kernel)
        return bind(kernel, *arguments)

    monkeypatch.setattr("numba_atomflow.backends.cpu.bind.bind", recorded)
    with Engine.load(random_checkpoint, backend="cpu", threads=1) as engine:
        engine.warm_up()
        assert engine.position == 0
        warm = set(kernels)
        for length in (1, 2, GEMV_TOKENS, GEMV_TOKENS + 1, 100):
            engine.reset()
            engine.feed(list(range(length)))
        engine.reset()
        engine.generate_tokens([0], SamplingParams(max_tokens=2)).finish()
    assert set(kernels) == warm
    assert len(warm) > 8


def test_a_new_reply_ends_the_one_before(scripted: Engine) -> None:
    """They would share one KV cache: going on with the old one would go on with the new one's text."""
    old = scripted.generate("ab")
    assert next(old) == "c"
    waiting = scripted.generate("X")
    assert list(old) == []
    assert old.finish_reason == "interrupted"
    new = scripted.generate("ef", SamplingParams(max_tokens=1))
    assert new.finish().text == "g"
    assert (list(waiting), waiting.finish_reason) == ([], "interrupted")


@pytest.mark.parametrize("change", ["reset", "feed", "rewind"])
def test_changing_the_cache_ends_a_reply(scripted: Engine, change: str) -> None:
    reply = scripted.generate("ab")
    next(reply)
    if change == "reset":
        scripted.reset()
    elif change == "feed":
        scripted.feed(byte_ids("X"))
    else:
        scripted.rewind(1)
    assert (list(reply), reply.finish_reason) == ([], "interrupted")


# --- tokens and logits -------------------------------------------------------------------------------------------

# Two ways of summing the same float32 products: each layer adds a few roundings of sums of some hundred terms.
SAME = 1e-5


def test_all_logits_over_several_blocks_equal_token_by_token(engine: Engine) -> None:
    tokens = some_tokens(600)
    assert len(tokens) > engine.backend.prefill_chunk
    chunked = engine.feed(tokens, all_logits=True)
    assert chunked.shape == (600, SMALLEST_VOCABULARY)
    assert chunked.dtype == np.float32
    assert engine.position == 600
    engine.reset()
    single = np.stack([engine.feed([token]) for token in tokens])
    errors = [relative_l2(a, b) for a, b in zip(chunked, single, strict=True)]
    assert max(errors) <= SAME, f"{max(errors):.3g} at position {np.argmax(errors)}"
    np.testing.assert_array_equal(chunked.argmax(axis=1), single.argmax(axis=1))


@pytest.mark.parametrize("chunk", [10, 18, 20, 25, 100])
def test_logits_have_the_same_bits_for_every_chunk_length(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """18 and 25 leave one row and eight behind the 17 whose logits are computed at once."""
    tokens = some_tokens(540)
    assert 540 % chunk not in range(1, GEMV_TOKENS + 1)
    whole = engine.feed(tokens, all_logits=True)
    engine.reset()
    monkeypatch.setattr(engine.backend, "prefill_chunk", chunk)
    np.testing.assert_array_equal(engine.feed(tokens, all_logits=True), whole)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 17, 512, 513, 600])
def test_the_last_logits_are_the_last_of_all(engine: Engine, count: int) -> None:
    tokens = some_tokens(count)
    every = engine.feed(tokens, all_logits=True)
    engine.reset()
    last = engine.feed(tokens)
    assert last.shape == (SMALLEST_VOCABULARY,)
    assert relative_l2(last, every[-1]) <= SAME
    assert engine.token_ids == tokens


@pytest.mark.parametrize("cuts", [[1], [5], [300, 4, 1, 2], [512], [511, 1]])
def test_a_prompt_in_parts_equals_the_whole(engine: Engine, cuts: list[int]) -> None:
    tokens = some_tokens(540)
    whole = engine.feed(tokens)
    engine.reset()
    parts = np.split(tokens, np.cumsum(cuts))
    for part in parts:
        logits = engine.feed(part.tolist())
    assert relative_l2(logits, whole) <= SAME


def test_what_was_rewound_leaves_no_trace(engine: Engine) -> None:
    kept, dropped, new = some_tokens(20), some_tokens(30, seed=1), some_tokens(9, seed=2)
    engine.feed(kept)
    expected = engine.feed(new, all_logits=True)
    engine.reset()
    engine.feed(kept)
    engine.feed(dropped)
    engine.rewind(20)
    assert engine.token_ids == kept
    np.testing.assert_array_equal(engine.feed(new, all_logits=True), expected)


def test_logits_depend_on_the_tokens_before(engine: Engine) -> None:
    first, second = engine.feed([10, 20, 30]), None
    engine.reset()
    second = engine.feed([11, 20, 30])
    assert relative_l2(second, first) > 1e-3
    engine.reset()
    swapped = engine.feed([20, 10, 30])
    assert relative_l2(swapped, first) > 1e-3


def test_greedy_replies_follow_the_logits(engine: Engine) -> None:
    prompt = some_tokens(12)
    reply = engine.generate(prompt, SamplingParams(max_tokens=30, ignore_eos=True)).finish()
    engine.reset()
    logits, by_hand = engine.feed(prompt), []
    for _ in range(30):
        by_hand.append(int(logits.argmax()))
        logits = engine.feed(by_hand[-1:])
    assert reply.token_ids == by_hand


def test_a_common_beginning_is_not_computed_again(engine: Engine) -> None:
    prompt, params = some_tokens(50), SamplingParams(max_tokens=8, ignore_eos=True)
    first = engine.generate(prompt, params).finish()
    assert first.stats.reused_tokens == 0
    longer = [*prompt, *first.token_ids, 7, 8]
    second = engine.generate(longer, params).finish()
    assert second.stats.reused_tokens == 57  # all but the last token of the reply, which was never fed
    assert second.stats.prompt_tokens == 60
    branch = engine.generate([*prompt[:30], 9], params).finish()
    assert branch.stats.reused_tokens == 30
    same = engine.generate([*prompt[:30], 9], params).finish()
    assert same.stats.reused_tokens == 30  # one token is always fed
    for asked, got in ((longer, second), ([*prompt[:30], 9], branch), ([*prompt[:30], 9], same)):
        engine.reset()
        assert engine.generate(asked, params).finish().token_ids == got.token_ids


def test_a_chat_goes_on_where_it_was(engine: Engine) -> None:
    messages, params = [{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=4, ignore_eos=True)
    first = engine.chat(messages, params).finish()
    messages += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Again"}]
    second = engine.chat(messages, params).finish()
    assert second.stats.reused_tokens >= first.stats.prompt_tokens
    engine.reset()
    assert engine.chat(messages, params).finish().token_ids == second.token_ids


def test_a_conversation_may_be_given_as_token_ids(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(max_tokens=5)
    expected = engine.chat(messages, params).finish().text
    assert engine.chat_tokens(engine.text.encode_chat(messages), params).finish().text == expected


def test_a_seed_repeats_a_reply(engine: Engine) -> None:
    def reply(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=24, ignore_eos=True)
        engine.reset()
        return engine.generate(some_tokens(9), params).finish().token_ids

    assert reply(3) == reply(3)
    assert reply(3) != reply(4)
    assert reply(None) != reply(None)


def test_a_repetition_penalty_knows_the_prompt(scripted: Engine) -> None:
    params = SamplingParams(repetition_penalty=100.0, max_tokens=1)
    assert scripted.generate("a", params).finish().text == "b"
    assert scripted.generate("ba", params).finish().text != "b"


# --- several engines, and their end ------------------------------------------------------------------------------


def test_engines_do_not_disturb_each_other(scripted_checkpoint: Path, random_checkpoint: Path) -> None:
    with (
        Engine.load(scripted_checkpoint, max_seq_len=64, threads=1) as one,
        Engine.load(scripted_checkpoint, max_seq_len=64, threads=1) as two,
        Engine.load(random_checkpoint, threads=1) as three,
    ):
        a, b = one.generate("a"), two.generate("c")
        noise = three.generate(some_tokens(40), SamplingParams(ignore_eos=True))
        texts = ["", ""]
        for _ in range(4):
            next(noise)
            texts[0] += next(a)
            texts[1] += next(b)
        assert texts == ["bcde", "defg"]


def test_closing_releases_the_backend_and_can_be_done_twice(random_checkpoint: Path) -> None:
    engine = Engine.load(random_checkpoint)
    engine.feed([5])
    gone = weakref.ref(engine.backend)
    gc.disable()  # not even a reference cycle may keep the KV cache
    try:
        engine.close()
        assert gone() is None
    finally:
        gc.enable()
    engine.close()


def test_weights_per_token_are_the_checkpoint_less_its_embedding(engine: Engine) -> None:
    embedding = sum(engine.checkpoint.array(f"embedding.{part}").nbytes for part in ("weight", "scale"))
    row = embedding // engine.geometry.vocabulary
    assert engine.weight_bytes_per_token == engine.checkpoint.payload_bytes - embedding + row


def test_progress_is_reported_while_loading(random_checkpoint: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with Engine.load(random_checkpoint, progress=lambda *step: seen.append(step)) as engine:
        assert engine.load_seconds > 0
        assert engine.position == 0
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2] > 4


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(scripted_checkpoint: Path) -> None:
    with Engine.load(scripted_checkpoint, max_seq_len=8) as engine:
        expected = r"prompt has 9 tokens, but the context holds 8; .*--max-seq-len \(the model allows 1024\)"
        with pytest.raises(ContextError, match=expected):
            engine.generate("abcdefgXY")
        with pytest.raises(ContextError, match=expected):
            engine.feed(byte_ids("abcdefgXY"), all_logits=True)
        engine.feed([5, 6])
        with pytest.raises(ContextError, match="has 7 tokens, but the context holds 8, of which 2 are taken"):
            engine.feed([5] * 7)
        assert engine.token_ids == [5, 6]
        assert engine.generate("a", SamplingParams(max_tokens=2)).finish().text == "bc"


@pytest.mark.parametrize("bad", [-1, SMALLEST_VOCABULARY, 1 << 40])
def test_a_token_outside_the_vocabulary_is_refused(engine: Engine, bad: int) -> None:
    for action in (engine.feed, engine.generate):
        with pytest.raises(OptionError, match=f"Token {bad} does not exist; the vocabulary has {SMALLEST_VOCABULARY}"):
            action([5, bad, 6])
    assert engine.position == 0


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    for action in (lambda: engine.generate(""), lambda: engine.generate([]), lambda: engine.feed([])):
        with pytest.raises(OptionError, match="prompt is empty"):
            action()


@pytest.mark.parametrize("position", [-1, 4])
def test_rewinding_to_nowhere_is_refused(engine: Engine, position: int) -> None:
    engine.feed([5, 6, 7])
    with pytest.raises(ContextError, match=f"holds 3 tokens; it cannot be rewound to {position}"):
        engine.rewind(position)
    assert engine.position == 3


@pytest.mark.parametrize("requested", [0, -5, MAX_POSITIONS + 1])
def test_a_context_that_the_model_does_not_allow_is_refused(random_checkpoint: Path, requested: int) -> None:
    with pytest.raises(OptionError, match=f"max_seq_len is {requested}; this model allows 1 to {MAX_POSITIONS}"):
        Engine.load(random_checkpoint, max_seq_len=requested)


def test_the_default_context_is_what_the_model_allows_up_to_4096() -> None:
    assert choose_max_seq_len(tiny_geometry(max_positions=512), None) == 512
    assert choose_max_seq_len(tiny_geometry(max_positions=131072), None) == 4096
    assert choose_max_seq_len(tiny_geometry(max_positions=131072), 131072) == 131072


def test_an_unknown_backend_or_checkpoint_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no backend 'tpu'"):
        Engine.load(random_checkpoint, backend="tpu")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nowhere\.safetensors"):
        Engine.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="no model 'no-such-model'"):
        Engine.load("no-such-model")


def test_a_model_without_a_tokenizer_still_takes_token_ids(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.warns(SourceWarning, match=r"no tokenizer\.json"):
        convert(tmp_path / "hf", tmp_path / "plain.safetensors")
    with Engine.load(tmp_path / "plain.safetensors") as engine:
        assert np.isfinite(engine.feed([5, 6, 7])).all()
        with pytest.raises(TextError, match="no tokenizer"):
            engine.generate("text")


def test_token_ids_may_be_an_array(engine: Engine) -> None:
    tokens = some_tokens(7)
    expected = engine.feed(tokens)
    engine.reset()
    np.testing.assert_array_equal(engine.feed(np.array(tokens)), expected)
    assert engine.token_ids == tokens


# --- threads ---------------------------------------------------------------------------------------------------------


def test_threads_change_speed_and_nothing_else(random_checkpoint: Path) -> None:
    prompt = list(range(40))
    with Engine.load(random_checkpoint, threads=1) as one, Engine.load(random_checkpoint) as all_cores:
        assert relative_l2(one.feed(prompt), all_cores.feed(prompt)) < 1e-6  # tiles are cut differently
        replies = [
            engine.generate(prompt, SamplingParams(max_tokens=8)).finish().token_ids for engine in (one, all_cores)
        ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize("threads", [0, -1, 1_000_000])
def test_a_number_of_threads_that_the_machine_lacks_is_refused(random_checkpoint: Path, threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads is {threads}"):
        Engine.load(random_checkpoint, threads=threads)


# --- what must not pass in silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=1.0, seed=1)]
)
def test_a_damaged_checkpoint_is_noticed_by_what_it_computes(
    random_checkpoint: Path, tmp_path: Path, params: SamplingParams
) -> None:
    with Checkpoint.open(random_checkpoint) as checkpoint:
        at = checkpoint.array("final_norm").ctypes.data - checkpoint.array("embedding.weight").ctypes.data
        start = checkpoint.array("embedding.weight")
    data = bytearray(random_checkpoint.read_bytes())
    offset = data.index(start.tobytes()) + at
    data[offset : offset + 4] = np.float32(np.nan).tobytes()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    with (
        Engine.load(damaged, threads=1) as engine,
        pytest.raises(CheckpointError, match=r"NaN.*damaged.*--verify"),
    ):
        engine.generate([5, 6, 7], params).finish()


def test_a_refused_prompt_leaves_the_kv_cache_alone(scripted: Engine) -> None:
    held = some_tokens(30)
    scripted.feed(held)
    with pytest.raises(OptionError, match="Token 1000000 does not exist"):
        scripted.generate([10**6])
    with pytest.raises(ContextError, match="has 65 tokens, but the context holds 64;"):
        scripted.generate(held + some_tokens(35, seed=1))
    assert scripted.token_ids == held


@pytest.mark.parametrize("tokens", [[1.5], ["a"], [[1, 2]], np.array([True, False])])
def test_token_ids_are_whole_numbers(scripted: Engine, tokens: list[int]) -> None:
    with pytest.raises(OptionError, match="flat list of whole numbers"):
        scripted.feed(tokens)


@pytest.mark.parametrize(("speculate", "step"), [("off", "decode"), ("lookup", "verify")])
def test_an_exception_in_the_middle_ends_the_reply(
    scripted: Engine, monkeypatch: pytest.MonkeyPatch, speculate: Speculate, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    reply = scripted.generate("a", SamplingParams(speculate=speculate))
    assert next(reply) == "b"
    monkeypatch.setattr(scripted.backend, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    assert reply.finish_reason == "interrupted"
    assert list(reply) == []
    monkeypatch.undo()
    assert scripted.generate("a").finish().text == SCRIPT[1:]


def test_the_space_before_the_first_word_of_a_reply_is_kept(tmp_path: Path) -> None:
    """SentencePiece tokenizers encode the space before a word, and drop the one at the start of a text."""
    tokenizer, _ = sentencepiece()
    words = [token for spelling, token in sorted(tokenizer.get_vocab().items()) if spelling.startswith("▁t")][:2]
    assert len(words) == 2
    geometry = tiny_geometry(vocabulary=tokenizer.get_vocab_size(), max_positions=64)
    weights = random_weights(geometry)
    for name, values in weights.items():
        if "o_proj" in name or "down_proj" in name:
            values[:] = 0
    weights["model.norm.weight"][:] = 1
    weights["lm_head.weight"][:] = 0
    weights["lm_head.weight"][words[1]] = weights["model.embed_tokens.weight"][words[0]]  # the one follows the other
    write_hf_folder(tmp_path / "hf", geometry, weights=weights)
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer.to_str())
    write_json(tmp_path / "hf" / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    with Engine.load(convert(tmp_path / "hf", tmp_path / "spaces.safetensors"), threads=1) as engine:
        reply = engine.generate([words[0]], SamplingParams(max_tokens=1)).finish()
        assert reply.token_ids == [words[1]]
        assert engine.text.decode(words) == tokenizer.decode(words[:1]) + reply.text
        assert reply.text.startswith(" ")
