"""Codec, chat template and detokenizer, with toy tokenizers."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import CONVERSATIONS, SAMPLES
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from toy_tokenizers import byte_level, sentencepiece

from numba_atomflow.errors import AtomFlowError, CheckpointError, OptionError, TextError
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf
from numba_atomflow.text.codec import TextAssets, TextCodec
from numba_atomflow.text.detokenizer import Detokenizer, TokenBytes, byte_alphabet

BYTE_LEVEL = TextCodec(assets_from_gguf(byte_level()[1]))
SENTENCEPIECE = TextCodec(assets_from_gguf(sentencepiece()[1]))
CODECS = pytest.mark.parametrize("codec", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])

USER = [{"role": "user", "content": "hi"}]


def pieces_of(codec: TextCodec, ids: Sequence[int]) -> list[str]:
    stream = codec.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def with_template(template: str | None, **changes: Any) -> TextCodec:
    return TextCodec(replace(BYTE_LEVEL.assets, chat_template=template, **changes))


# --- streaming -------------------------------------------------------------------------------------------------------


@CODECS
def test_pieces_join_to_the_decoded_text(codec: TextCodec) -> None:
    for text in SAMPLES:
        ids = codec.encode(text)
        pieces = pieces_of(codec, ids)
        assert "".join(pieces) == codec.decode(ids), text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@CODECS
@given(text=st.text())
@settings(deadline=None)
def test_streamed_text_is_the_decoded_text_in_complete_characters(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text)
    pieces = pieces_of(codec, ids)
    assert "".join(pieces) == codec.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""  # a complete text leaves no rest


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocabulary_size + 5)))
@settings(deadline=None, max_examples=300)
def test_any_byte_level_tokens_stream_as_they_decode(ids: list[int]) -> None:
    """Including invalid UTF-8, special tokens, and ids beyond the vocabulary (padding rows)."""
    assert "".join(pieces_of(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_a_character_of_four_tokens_is_returned_with_the_fourth() -> None:
    byte_tokens = {byte: f"<0x{byte:02X}>" for byte in "😀".encode()}
    ids = [SENTENCEPIECE._tokenizer.token_to_id(token) for token in byte_tokens.values()]
    assert pieces_of(SENTENCEPIECE, ids) == ["", "", "", "😀", ""]


def test_an_incomplete_character_becomes_one_replacement_at_the_end() -> None:
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    ids = [BYTE_LEVEL._tokenizer.token_to_id(spelling[byte]) for byte in "😀".encode()[:3]]
    assert pieces_of(BYTE_LEVEL, ids) == ["", "", "", "\ufffd"]


def test_sentencepiece_keeps_characters_before_invalid_bytes() -> None:
    """Unlike `decode`, which replaces the whole run of byte tokens if one byte is invalid."""
    ids = [SENTENCEPIECE._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (*"é".encode(), 0xFF)]
    assert pieces_of(SENTENCEPIECE, ids) == ["", "é", "\ufffd", ""]
    assert SENTENCEPIECE.decode(ids) == "\ufffd" * 3


def test_special_tokens_give_nothing_even_inside_a_character() -> None:
    first, second = (SENTENCEPIECE._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode())
    ids = [1, first, 2, second, 2]
    assert pieces_of(SENTENCEPIECE, ids) == ["", "", "", "é", "", ""]
    assert SENTENCEPIECE.decode(ids) == "é"


def test_sentencepiece_drops_one_space_at_the_start_and_only_there() -> None:
    ids = SENTENCEPIECE.encode("the end", add_special=False)
    assert SENTENCEPIECE._tokenizer.id_to_token(ids[0]).startswith("▁")
    stream = SENTENCEPIECE.stream()
    assert "".join(map(stream.push, ids)) == "the end"
    assert "".join(map(stream.push, ids)) == " the end"  # a reply that goes on from a prompt keeps its space
    stream.flush()
    assert "".join(map(stream.push, ids)) == "the end"  # a new reply


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
    ],
    ids=["metaspace", "metaspace without prefix", "sequence", "strip three"],
)
def test_other_decoders_of_the_family_stream_as_they_decode(decoder: Any) -> None:
    tokenizer = Tokenizer.from_buffer(SENTENCEPIECE.assets.tokenizer_json)
    tokenizer.decoder = decoder
    codec = TextCodec(TextAssets(tokenizer_json=tokenizer.to_str().encode()))
    for text in ("    a", "x y", "é", "▁ ▁", ""):
        ids = codec.encode(text)
        assert "".join(pieces_of(codec, ids)) == codec.decode(ids)


def test_a_tokenizer_without_decoder_puts_spaces_between_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    codec = TextCodec(TextAssets(tokenizer_json=tokenizer.to_str().encode()))
    assert pieces_of(codec, [1, 2, 9, 1]) == ["a", " b", "", " a", ""]
    assert codec.decode([1, 2, 9, 1]) == "a b a"


def test_each_token_is_decoded_once() -> None:
    """The cost per token is constant: only the text of the new token is read."""

    class Spy:
        decoder = BYTE_LEVEL._tokenizer.decoder
        asked: list[int] = []  # noqa: RUF012

        def get_added_tokens_decoder(self) -> dict[int, Any]:
            return BYTE_LEVEL._tokenizer.get_added_tokens_decoder()

        def id_to_token(self, token_id: int) -> str:
            self.asked.append(token_id)
            return BYTE_LEVEL._tokenizer.id_to_token(token_id)

    spy = Spy()
    ids = BYTE_LEVEL.encode("".join(SAMPLES).replace("<", ""))
    stream = Detokenizer(TokenBytes(spy))  # type: ignore[arg-type]
    held = max(len(stream._utf8.getstate()[0]) for token_id in ids if stream.push(token_id) is not None)
    assert spy.asked == ids
    assert held <= 3  # bytes of an unfinished character


def test_a_decoder_of_another_family_is_refused_by_name() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(TextError, match="'WordPiece'"):
        TextCodec(TextAssets(tokenizer_json=tokenizer.to_str().encode()))


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert BYTE_LEVEL.decode([BYTE_LEVEL._tokenizer.token_to_id(character) for character in "ĠĊ"]) == " \n"


# --- codec -----------------------------------------------------------------------------------------------------------


def test_truncation_and_padding_of_a_tokenizer_are_disabled() -> None:
    tokenizer = Tokenizer.from_buffer(BYTE_LEVEL.assets.tokenizer_json)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    codec = TextCodec(TextAssets(tokenizer_json=tokenizer.to_str().encode()))
    for text in ("", "x", "a longer text than four tokens can hold"):
        assert codec.encode(text) == BYTE_LEVEL.encode(text)


def test_a_lone_surrogate_is_reported_with_its_position() -> None:
    with pytest.raises(TextError, match="Character 3 "):
        BYTE_LEVEL.encode("ab\udce9")


@CODECS
@pytest.mark.parametrize("ids", [None, 5, "12", [1.5], [True], [[1]], np.array(5)], ids=repr)
def test_ids_to_decode_are_whole_numbers(codec: TextCodec, ids: Any) -> None:
    with pytest.raises(OptionError, match="Token ids must be a flat list of whole numbers"):
        codec.decode(ids)


def test_eos_ids_and_vocabulary_size() -> None:
    assert BYTE_LEVEL.eos_ids == frozenset({1, 2})
    assert BYTE_LEVEL.vocabulary_size == len(byte_level()[1]["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("assets", "fault"),
    [
        (TextAssets(), "no tokenizer"),
        (TextAssets(tokenizer_json=b'{"version"'), "cannot be read"),
        (replace(BYTE_LEVEL.assets, add_bos=True, bos_token="<bos>"), "'<bos>'"),
        (replace(BYTE_LEVEL.assets, add_bos=True, bos_token=None), "BOS"),
    ],
)
def test_assets_that_cannot_be_used_are_refused(assets: TextAssets, fault: str) -> None:
    with pytest.raises(TextError, match=fault):
        TextCodec(assets)


def test_assets_round_trip_through_a_record() -> None:
    assets = replace(SENTENCEPIECE.assets, chat_template="{{ 'é' }}", pad_token=None)
    record = assets.to_dict()
    assert "tokenizer_json" not in record
    assert TextAssets.from_dict(record, assets.tokenizer_json) == assets


@pytest.mark.parametrize(
    "record",
    [
        {"colour": "red"},
        {"tokenizer_json": "{}"},
        {"eos_ids": ["x"]},
        {"eos_ids": 3},
        {"eos_ids": [1.5]},
        {"eos_ids": [-1]},
        {"chat_template": 5},
        {"bos_token": 7},
        {"pad_token": ["<pad>"]},
        {"add_bos": "x"},
        {"add_bos": None},
    ],
)
def test_a_damaged_record_is_a_checkpoint_error(record: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="text record"):
        TextAssets.from_dict(record, None)


def test_importing_text_loads_neither_jinja_nor_tokenizers() -> None:
    heavy = ("jinja2", "tokenizers", "numpy")
    code = f"import sys, numba_atomflow.text.codec; print([m for m in {heavy} if m in sys.modules])"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


# --- chat ------------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}\n  {{ '<|' + m.role + '|>' + m.content }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_blocks_are_trimmed_as_templates_expect() -> None:
    codec = with_template(CHATML)
    assert codec.render_chat(USER) == "  <|user|>hi\n<|assistant|>"
    assert codec.render_chat(USER, add_generation_prompt=False) == "  <|user|>hi\n"


def test_a_chat_is_encoded_without_a_second_bos() -> None:
    codec = with_template("{{ bos_token }}{{ messages[0].content }}<|im_end|>", add_bos=True)
    assert codec.encode_chat(USER) == [0, *BYTE_LEVEL.encode("hi"), 2]


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é<>&\'"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "é<>&\'"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "é<>&'!"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ dict(a=1) }}", "{'a': 1}"),
        ("{{ tools is none }}{{ pad_token is defined }}{{ eos_token }}", "TrueFalse<|endoftext|>"),
        ("{{ messages[0].content.strip().upper() }}", "É<>&'"),
    ],
)
def test_what_templates_written_for_transformers_use(template: str, rendered: str) -> None:
    assert with_template(template).render_chat([{"role": "user", "content": "é<>&'"}]) == rendered


def test_templates_can_use_the_date() -> None:
    stated = with_template("{{ strftime_now('%Y') }}").render_chat(USER)
    assert stated.isdigit()
    assert int(stated) >= 2024


ATTACKS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['__class__'] | map('attr', '__class__') | list }}",
    "{{ [messages] | map(attribute='__class__') | list }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ dict.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace.__mro__ }}",
    "{{ range.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler('a').__init__ }}",
    "{{ joiner().__call__.__globals__ }}",
    "{{ cycler.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map(dict(a=1)) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}{{ ns }}",
    "{{ namespace(__html__=1) }}",
    "{{ namespace(dict(__call__=1)) }}",
    "{% set x = messages.append(1) %}",
    "{% set x = messages[0].update(role='x') %}",
    "{% set x = messages[0].clear() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_a_malicious_template_has_no_access(template: str) -> None:
    try:
        rendered = with_template(template).render_chat(USER)
    except TextError:
        return
    assert rendered in ("", "['']", "[Undefined]")


def test_methods_of_a_string_subclass_do_not_reach_the_template() -> None:
    class Loaded(str):
        def fire(self) -> str:
            return "fired"

    with pytest.raises(TextError):
        with_template("{{ messages[0].content.fire() }}").render_chat([{"role": "user", "content": Loaded("x")}])


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ messages[9].content.x }}", "cannot be rendered"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "cannot be rendered"),
        ("{{ 'a' * 10**18 }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('Roles must\nalternate!') }}", "refuses this conversation: Roles must alternate!"),
    ],
)
def test_a_template_that_fails_gives_one_sentence(template: str, fault: str) -> None:
    with pytest.raises(TextError) as refusal:
        with_template(template).render_chat(USER)
    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, AtomFlowError)


def test_a_model_without_template_is_reported() -> None:
    with pytest.raises(TextError, match=r"no chat template.*generate"):
        with_template(None).encode_chat(USER)


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "Message 1 .* no 'content'"),
        ([*USER, {"content": "x"}], "Message 2 .* no 'role'"),
        ([{"role": "user", "content": None}], "no 'content'"),
        ([{"role": "user", "content": ["x"]}], "'content' of message 1 .* no text part"),
        ([{"role": "wizard", "content": "x"}], "unknown role 'wizard'"),
        (["hi"], "Message 1 .* not a mapping"),
        (np.array(5), "A chat is a list of messages"),
        ([*USER, {"role": "assistant", "content": None, "tool_calls": np.array([1, 2])}], "Message 2 .* no 'content'"),
        ([*USER, {"role": "assistant", "content": None, "tool_calls": []}], "Message 2 .* no 'content'"),
    ],
)
def test_a_malformed_message_is_reported(messages: Any, fault: str) -> None:
    with pytest.raises(TextError, match=fault):
        with_template(CHATML).render_chat(messages)


def test_every_sample_conversation_renders_with_its_contents() -> None:
    codec = with_template(CHATML)
    for messages in CONVERSATIONS.values():
        rendered = codec.render_chat(messages)
        assert all(message["content"] in rendered for message in messages)
