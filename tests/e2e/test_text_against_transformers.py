"""Tokens, texts and chats compared with transformers on the same GGUF files.

transformers' GGUF reader ignores two rules of the models' own tokenizer.json (docs/decisions.md): SmolLM splits off
every digit first, and SentencePiece inserts a space even before a text that begins with one. The reference is changed
to follow them.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from text_samples import CONVERSATIONS, SAMPLES
from tiny_models import add_gguf_field
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from toy_tokenizers import PRE_TOKENIZERS, byte_level, sentencepiece

from numba_atomflow.sources import open_source
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf
from numba_atomflow.text.codec import TextCodec

transformers = pytest.importorskip("transformers", reason="transformers is the reference: pip install '.[validate]'")

# Beside SmolLM2's own: what templates of other models do, in short.
TEMPLATES: dict[str, str | None] = {
    "the model's own": None,
    "llama 3 style": (
        "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{{- '<|system|>' + system + '<|eot|>' }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|' + message['role'] + '|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|assistant|>\\n\\n' }}\n{%- endif %}"
    ),
    "indented blocks": (
        "{% for message in messages %}\n"
        "    {% if message.role == 'user' %}\n  U: {{ message.content }}\n    {% elif loop.last %}\n"
        "  {% generation %}A: {{ message.content }}{{ eos_token }}{% endgeneration %}\n    {% endif %}\n"
        "{% endfor %}\n{{ unk_token }}{{ pad_token }}"
    ),
    "tojson, namespace, loop controls": (
        "{% set ns = namespace(count=0) %}{% for message in messages %}{% set ns.count = ns.count + 1 %}"
        "{% if ns.count > 3 %}{% break %}{% endif %}{{ message | tojson }}{{ message.content | tojson(indent=2) }}"
        "{% endfor %}{{ ns.count }}{% if tools is not none %}tools{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    return load_reference(smollm2_gguf, digits_first)


@pytest.fixture(scope="module")
def codec(smollm2_gguf: Path) -> TextCodec:
    return TextCodec(open_source(smollm2_gguf).text)


def load_reference(path: Path, own_rule: Callable[[Tokenizer], None]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about its dependencies
        reference = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    own_rule(reference.backend_tokenizer)
    return reference


def no_change(tokenizer: Tokenizer) -> None:
    pass


def normalised(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()  # transformers' reader leaves it out, its class for these models has it


def digits_first(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"]


def space_before_every_text(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)  # what None would be


def test_there_are_enough_samples() -> None:
    assert len(set(SAMPLES)) >= 200
    assert len(CONVERSATIONS) >= 5


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_smollm2_tokens_are_identical_and_decode_to_the_text(reference: Any, codec: TextCodec, text: str) -> None:
    ids = codec.encode(text)
    assert ids == reference(text)["input_ids"]
    assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert codec.decode(ids, skip_special=False) == text
    stream = codec.stream()
    pieces = [*map(stream.push, ids), stream.flush()]
    assert "".join(pieces) == codec.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_smollm2_chats_are_identical(
    reference: Any, smollm2_gguf: Path, codec: TextCodec, messages: list[dict[str, str]], template: str | None
) -> None:
    if template is not None:
        codec = TextCodec(replace(codec.assets, chat_template=template))
    for prompt in (True, False):
        expected = reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert codec.render_chat(messages, add_generation_prompt=prompt) == expected
    ids = reference.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert codec.encode_chat(messages) == ids


def test_smollm2_named_tokens_are_identical(reference: Any, codec: TextCodec) -> None:
    assert codec.assets.special_tokens() == reference.special_tokens_map
    assert reference.eos_token_id in codec.eos_ids
    assert codec.vocabulary_size == len(reference)
    assert [codec.decode([i], skip_special=False) for i in codec.eos_ids] == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("make", "own_rule"),
    [
        (byte_level, no_change),
        (lambda: byte_level("llama-bpe"), no_change),
        (lambda: byte_level("qwen2"), normalised),
        (sentencepiece, space_before_every_text),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2", "sentencepiece"],
)
def test_other_kinds_of_tokenizer_are_identical(
    make: Callable[[], Any], own_rule: Callable[[Tokenizer], None], tmp_path: Path
) -> None:
    _, fields = make()
    path = tmp_path / "toy.gguf"
    write_gguf(path, fields)
    expected = load_reference(path, own_rule)
    codec = TextCodec(assets_from_gguf(fields))
    for text in SAMPLES:
        if text.startswith("<s>"):
            continue  # the text begins with a BOS: transformers adds a second one
        ids = codec.encode(text)
        assert ids == expected(text)["input_ids"], text
        assert codec.decode(ids) == expected.decode(ids, skip_special_tokens=True)


def write_gguf(path: Path, fields: dict[str, Any]) -> None:
    """A GGUF file with tokenizer and sizes only: transformers reads the sizes first."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in fields.items():
        add_gguf_field(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
