"""A Hugging Face folder and a GGUF file of one model give the same tokens, texts and chats: each supported family.

The folder's tokenizer.json has the parts that the family's own has, the file what llama.cpp's converter writes of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from text_samples import CONVERSATIONS, SAMPLES
from tiny_models import tiny_geometry, write_gguf, write_hf_folder, write_json
from tokenizers import Tokenizer, processors
from toy_tokenizers import UNUSED, byte_level, sentencepiece

from numba_atomflow.sources import open_source
from numba_atomflow.text.codec import TextCodec

MORE_SAMPLES = [
    "café señor",  # decomposed
    "List:\n\n1. Nile\n\n2. Amazon\n\n10) Rhine",
    "  two spaces first",
    "<s>[INST] Hi [/INST] Hello.</s><s>[INST] And  now? [/INST]",
    "<|im_start|>user\n 12<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n7<|eot_id|>",
    "<think>\n3\n</think>",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass
class Family:
    """One tokenizer, as a folder and as a GGUF file."""

    tokenizer: Tokenizer
    fields: dict[str, Any]
    template: str
    eos: list[str]  # in generation_config.json
    named: dict[str, str | None]  # in tokenizer_config.json
    geometry: dict[str, Any] = field(default_factory=dict)
    begins_with: str | None = None  # tokenizer.json's post-processor puts it first


def llama2() -> Family:
    tokenizer, fields = sentencepiece()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Family(tokenizer, fields, INSTRUCTIONS, ["</s>"], named, begins_with="<s>")


def mistral3() -> Family:
    tokenizer, fields = sentencepiece(["[INST]", "[/INST]", "[TOOL_CALLS]"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Family(tokenizer, fields, INSTRUCTIONS, ["</s>"], named, begins_with="<s>")


def llama3() -> Family:
    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer, fields = byte_level("llama-bpe", [*control, "<|eom_id|>", "<|eot_id|>"], [])
    fields |= {"tokenizer.ggml.eos_token_id": 5}
    del fields["tokenizer.ggml.add_bos_token"]  # the name of the pre-tokenizer says it
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    return Family(tokenizer, fields, HEADERS, ends, named, begins_with="<|begin_of_text|>")


def smollm2() -> Family:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<jupyter_start>"]
    tokenizer, fields = byte_level("smollm", control, [])
    fields |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return Family(tokenizer, fields, CHATML, ["<|endoftext|>", "<|im_end|>"], named)


def qwen(added: list[str], **geometry: bool) -> Family:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer, fields = byte_level("qwen2", control, added)
    count = len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.tokens"] += [f"[PAD{i}]" for i in range(count, count + 5)]  # rows of the embedding
    fields["tokenizer.ggml.token_type"] += [UNUSED] * 5
    fields |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Family(tokenizer, fields, CHATML, ["<|im_end|>", "<|endoftext|>"], named, geometry)


def other_pre_tokenizer(pre: str, bos: str, **geometry: bool) -> Callable[[], Family]:
    """A family that differs in its pre-tokenizer and in the name of its BOS, which a text begins with."""

    def family() -> Family:
        tokenizer, fields = byte_level(pre, [bos, "<|end_of_sentence|>", "<|im_end|>"], [])
        fields |= {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True}
        if pre == "tekken":
            del fields["tokenizer.ggml.add_bos_token"]  # the name of the pre-tokenizer says it
        named: dict[str, str | None] = {"bos_token": bos, "eos_token": "<|end_of_sentence|>"}
        ends = ["<|end_of_sentence|>", "<|im_end|>"]
        return Family(tokenizer, fields, INSTRUCTIONS, ends, named, geometry, begins_with=bos)

    return family


FAMILIES = {
    "llama 2, mistral 0.1": llama2,
    "mistral 0.3": mistral3,
    "llama 3": llama3,
    "smollm2": smollm2,
    "qwen2": lambda: qwen(["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], qkv_bias=True),
    "qwen3": lambda: qwen(["<tool_call>", "<think>", "</think>"], qk_norm=True),
    "mistral nemo": other_pre_tokenizer("tekken", "<s>"),
    "deepseek r1 qwen": other_pre_tokenizer("deepseek-r1-qwen", "<｜begin▁of▁sentence｜>", qkv_bias=True),
    "deepseek coder": other_pre_tokenizer("deepseek-coder", "<｜begin▁of▁sentence｜>"),
    "gpt-4o": other_pre_tokenizer("gpt-4o", "<|startoftext|>"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def codecs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextCodec, TextCodec]:
    """The folder's codec and the file's."""
    family = FAMILIES[request.param]()
    path = tmp_path_factory.mktemp("family")
    geometry = tiny_geometry(layers=1, hidden=64, heads=1, kv_heads=1, ffn=64, vocabulary=1024, **family.geometry)
    _write_folder(path / "hf", family, geometry)
    own = {key: value for key, value in family.fields.items() if value != []}
    write_gguf(path / "model.gguf", geometry, fields=own | {"tokenizer.chat_template": family.template})
    folder, file = open_source(path / "hf"), open_source(path / "model.gguf")
    assert folder.geometry == file.geometry
    assert (folder.warnings, file.warnings) == ((), ())
    return TextCodec(folder.text), TextCodec(file.text)


def _write_folder(path: Path, family: Family, geometry: Any) -> None:
    write_hf_folder(path, geometry)
    tokenizer = family.tokenizer
    if family.begins_with is not None:
        bos = (family.begins_with, tokenizer.token_to_id(family.begins_with))
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", None, [bos])
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    write_json(path / "tokenizer_config.json", family.named | {"chat_template": family.template})
    ends = [tokenizer.token_to_id(token) for token in family.eos]
    write_json(path / "generation_config.json", {"eos_token_id": ends})


def test_texts(codecs: tuple[TextCodec, TextCodec]) -> None:
    folder, file = codecs
    for text in (*SAMPLES, *MORE_SAMPLES):
        for add_special in (False, True):
            ids = folder.encode(text, add_special)
            assert file.encode(text, add_special) == ids, text
        for skip_special in (True, False):
            assert file.decode(ids, skip_special) == folder.decode(ids, skip_special), text


def test_every_token(codecs: tuple[TextCodec, TextCodec]) -> None:
    folder, file = codecs
    assert file.vocabulary_size == folder.vocabulary_size
    for token_id in range(1024):
        for skip_special in (True, False):
            assert file.decode([token_id], skip_special) == folder.decode([token_id], skip_special), token_id
        pieces = [(stream.push(token_id), stream.flush()) for stream in (folder.stream(), file.stream())]
        assert pieces[0] == pieces[1], token_id


def test_chats(codecs: tuple[TextCodec, TextCodec]) -> None:
    folder, file = codecs
    for messages in CONVERSATIONS.values():
        assert file.render_chat(messages) == folder.render_chat(messages)
        assert file.encode_chat(messages) == folder.encode_chat(messages)


def test_ends_of_a_reply(codecs: tuple[TextCodec, TextCodec]) -> None:
    folder, file = codecs
    assert file.eos_ids == folder.eos_ids
