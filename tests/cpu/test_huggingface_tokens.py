"""Tokens and flags in several files of a Hugging Face folder, compared with transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BOS, EOS, PAD, tiny_tokenizer, write_json
from tokenizers import AddedToken, Tokenizer, processors

from numba_atomflow.errors import SourceError
from numba_atomflow.sources.huggingface_text import folder_text
from numba_atomflow.text.codec import TextAssets, TextCodec

POOL = ["<|im_start|>", "<|im_end|>", "<think>", "<|a b|>", "word", "ab", "é", BOS, EOS, PAD]
NAMES = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "image_token"]
FLAGS = ["single_word", "lstrip", "rstrip", "normalized", "special"]
VOCABULARY = 320


def random_folder(folder: Path, rng: random.Random) -> None:
    """A tokenizer whose tokens are named in some of the files, by some of the keys, with some of the flags."""
    tokenizer = tiny_tokenizer()
    for content in rng.sample(POOL[:7], rng.randint(0, 4)):
        tokenizer.add_tokens([AddedToken(content, **random_flags(rng))])
    if rng.random() < 0.3:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    decoder = rng.random() < 0.5
    config |= random_names(rng, "decoder" if decoder else "")
    if decoder:
        listed = listed_tokens(tokenizer, rng)
        config["added_tokens_decoder"] = {str(i): {"content": text} | random_flags(rng) for text, i in listed.items()}
    write_json(folder / "tokenizer_config.json", config)
    if rng.random() < 0.6:
        write_json(folder / "special_tokens_map.json", random_names(rng, "map"))
    if rng.random() < 0.6:
        write_json(folder / "added_tokens.json", listed_tokens(tokenizer, rng))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())


def random_flags(rng: random.Random) -> dict[str, bool]:
    return {name: rng.random() < 0.5 for name in rng.sample(FLAGS, rng.randint(0, len(FLAGS)))}


def random_names(rng: random.Random, where: str) -> dict[str, Any]:
    """Names of special tokens, and special tokens without a name; no token is described twice in one file."""
    pool = rng.sample(POOL, len(POOL))
    record: dict[str, Any] = {name: pool.pop() for name in rng.sample(NAMES, rng.randint(0, len(NAMES)))}
    for name in list(record)[:2]:
        if where == "map":
            record[name] = {"content": record[name]} | random_flags(rng)
        elif where == "decoder" and name != "image_token":
            record[name] = {"__type": "AddedToken", "content": record[name], "normalized": rng.random() < 0.5}
    if rng.random() < 0.4:
        record[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = pool[:2]
    elif where != "map" and rng.random() < 0.5:
        record[rng.choice(["extra_special_tokens", "model_specific_special_tokens"])] = {"call_token": pool[0]}
    return record


def listed_tokens(tokenizer: Tokenizer, rng: random.Random) -> dict[str, int]:
    """Some tokens, new and old, with the ids that they will have."""
    target = rng.sample(POOL, rng.randint(0, 6))
    new = (text for text in target if tokenizer.token_to_id(text) is None)
    ids = {text: tokenizer.get_vocab_size() + i for i, text in enumerate(new)}
    return {text: ids.get(text, tokenizer.token_to_id(text)) for text in target}


def assets(folder: Path) -> TextAssets:
    return folder_text(folder, {}, VOCABULARY)[0]


TEXTS = [
    "a <|im_start|> b<|im_end|>c",
    "<think>x </think> <think> ",
    "wordword aword word.",
    "ab<|a b|>é e\u0301",
    f"{BOS}hi{EOS}",
]


def test_random_folders_tokenize_as_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    for seed in range(80):
        folder = tmp_path / str(seed)
        folder.mkdir()
        random_folder(folder, random.Random(seed))
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        actual = assets(folder)
        codec = TextCodec(actual)
        files = {path.name: json.loads(path.read_text()) for path in folder.iterdir() if path.name != "tokenizer.json"}
        assert actual.special_tokens() == theirs.special_tokens_map, (seed, files)
        for text in TEXTS:
            plain = codec.encode(text, add_special=False)
            assert plain == theirs.encode(text, add_special_tokens=False), (seed, text, files)
            ids = [*plain, *range(250, len(theirs))]
            assert codec.decode(ids) == theirs.decode(ids, skip_special_tokens=True), (seed, text, files)


# --- single rules --------------------------------------------------------------------------------------------------


def write_folder(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    write_json(folder / "tokenizer_config.json", config)
    for name, record in files.items():
        write_json(folder / f"{name}.json", record)
    return folder


def test_a_complete_tokenizer_is_unchanged(tmp_path: Path) -> None:
    listed = {str(i): {"content": text, "special": True} for i, text in enumerate((BOS, EOS, PAD))}
    write_folder(tmp_path, {"eos_token": EOS, "added_tokens_decoder": listed})
    assert assets(tmp_path).tokenizer_json == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("ids", [{"270": "<x>"}, {"5": "<x>"}, {"259": "<x>", "261": "<y>"}, {"1": BOS}])
def test_conflicting_ids_are_refused(tmp_path: Path, ids: dict[str, str]) -> None:
    write_folder(tmp_path, {"added_tokens_decoder": {key: {"content": text} for key, text in ids.items()}})
    with pytest.raises(
        SourceError, match=r"tokenizer_config\.json gives the token '<.*tokenizer\.json.*make the two files agree"
    ):
        assets(tmp_path)
    write_folder(tmp_path, {}, added_tokens={text: int(key) for key, text in ids.items()})
    with pytest.raises(SourceError, match=r"added_tokens\.json gives the token"):
        assets(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"-1": {"content": "<x>"}}},
        {"added_tokens_decoder": {"9" * 4000: {"content": "<x>"}}},
        {"added_tokens_decoder": {"259": "<x>"}},
        {"added_tokens_decoder": {"259": {"content": 5}}},
        {"added_tokens_decoder": {"259": {"content": "<x>", "lstrip": "yes"}}},
        {"added_tokens_decoder": [1]},
        {"eos_token": 5},
        {"eos_token": {"content": None}},
        {"extra_special_tokens": "<x>"},
        {"additional_special_tokens": [["<x>"]]},
        {"extra_special_tokens": {"x_token": 5}},
        {"add_bos_token": "yes"},
        {"chat_template": 5},
        {"chat_template": [{"name": "default", "template": 5}]},
        {"chat_template": [5]},
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path: Path, config: dict[str, Any]) -> None:
    write_folder(tmp_path, config)
    with pytest.raises(SourceError, match=r"tokenizer_config\.json has an unusable value for ") as caught:
        assets(tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("added", [5, [5], [{"id": 5}], [{"content": "<x>", "id": "5"}]])
def test_a_malformed_list_of_added_tokens(tmp_path: Path, added: Any) -> None:
    record = json.loads(tiny_tokenizer().to_str()) | {"added_tokens": added}
    write_json(tmp_path / "tokenizer.json", record)
    with pytest.raises(SourceError, match="unusable value for added_tokens"):
        assets(tmp_path)


@pytest.mark.parametrize("added", [{"<x>": 280}, {"<x>": 260, "<y>": 259}, {"": 259, "<x>": 260}, {"a": 259}, {BOS: 9}])
def test_ids_that_the_tokenizers_library_does_not_give_are_refused(tmp_path: Path, added: dict[str, int]) -> None:
    """The library numbers added tokens itself and ignores the ids in tokenizer.json."""
    record = json.loads(tiny_tokenizer().to_str())
    flags = dict.fromkeys(FLAGS, False)
    record["added_tokens"] += [{"id": token_id, "content": content} | flags for content, token_id in added.items()]
    write_json(tmp_path / "tokenizer.json", record)
    with pytest.raises(SourceError, match=r"tokenizer\.json gives the token '.* which the tokenizers library does not"):
        assets(tmp_path)


NAMED, NULL = {"bos_token": BOS, "eos_token": EOS}, {"bos_token": None, "eos_token": None}


@pytest.mark.parametrize(("config", "special_map"), [(NULL, NAMED), (NAMED, NULL), ({}, NAMED), (NAMED, {})])
def test_a_null_does_not_hide_the_name_in_the_other_file(tmp_path: Path, config: Any, special_map: Any) -> None:
    text = assets(write_folder(tmp_path, config, special_tokens_map=special_map))
    assert (text.bos_token, text.eos_token, text.eos_ids) == (BOS, EOS, (1,))


def test_with_added_tokens_decoder_the_names_of_the_map_only_end_a_reply(tmp_path: Path) -> None:
    """As in transformers, which does not open special_tokens_map.json then."""
    config = NULL | {"added_tokens_decoder": {"0": {"content": BOS, "special": True}}}
    text = assets(write_folder(tmp_path, config, special_tokens_map=NAMED))
    assert (text.bos_token, text.eos_token, text.eos_ids) == (None, None, (1,))


def test_every_name_reaches_the_chat_template(tmp_path: Path) -> None:
    template = "{{ sep_token }}{{ image_token }}{{ call_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"sep_token": "<s>", "image_token": "<i>", "extra_special_tokens": {"call_token": "<c>", "messages": "x"}}
    text = assets(write_folder(tmp_path, config | {"chat_template": template}))
    assert TextAssets.from_dict(json.loads(json.dumps(text.to_dict())), text.tokenizer_json) == text
    codec = TextCodec(text)
    assert codec.encode_chat([{"role": "user", "content": ""}]) == [
        codec.token_id(token) for token in ("<s>", "<i>", "<c>")
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": {"chat_template": "old"}}, "old"),
        ({"chat_template.json": {"chat_template": "old"}, "tokenizer_config.json": {"chat_template": None}}, "old"),
        ({"chat_template.json": {"chat_template": "old"}, "tokenizer_config.json": {"chat_template": "new"}}, "new"),
        ({"tokenizer_config.json": {"chat_template": {"default": "new", "tool_use": "x"}}}, "new"),
        ({"tokenizer_config.json": {"chat_template": "\u00e9"}, "chat_template.jinja": ""}, "\u00e9"),
    ],
)
def test_files_of_a_chat_template(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert assets(tmp_path).chat_template == expected


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]
)
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"bos_token": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"\\udc00": 5}', "half of a surrogate pair"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    ],
)
def test_json_beyond_the_standard(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    write_folder(tmp_path, {})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=fault) as caught:
        assets(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("other", ["tiktoken.model", "spiece.model"])
def test_a_vocabulary_in_another_format_is_refused(tmp_path: Path, other: str) -> None:
    write_folder(tmp_path, {})
    (tmp_path / other).write_bytes(b"x")
    assets(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=rf"holds its tokenizer as {other}, but no tokenizer\.json"):
        assets(tmp_path)


def test_tokens_beyond_the_embedding_are_reported(tmp_path: Path) -> None:
    write_folder(tmp_path, {"pad_token": "[PAD]"})
    (warning,) = folder_text(tmp_path, {}, 259)[0].warnings
    assert "the token '[PAD]' beyond the 259 rows" in warning


def test_ignored_settings_are_reported(tmp_path: Path) -> None:
    (warning,) = assets(write_folder(tmp_path, {"split_special_tokens": True})).warnings
    assert "split_special_tokens, which is ignored" in warning


@pytest.mark.parametrize("bos", [{}, {"bos_token": None}, {"bos_token": ""}])
def test_a_missing_bos_is_reported(tmp_path: Path, bos: dict[str, Any]) -> None:
    text = assets(write_folder(tmp_path, bos | {"add_bos_token": True}))
    assert not text.add_bos
    (warning,) = text.warnings
    assert "sets add_bos_token, but the folder names no bos_token" in warning


# --- one BOS -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("text", ["hi", f"{BOS}hi", BOS, ""])
def test_exactly_one_bos(tmp_path: Path, add_bos_token: bool, post_processor: bool, text: str) -> None:
    tokenizer = tiny_tokenizer()
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)]
        )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": BOS, "add_bos_token": add_bos_token})
    codec = TextCodec(assets(tmp_path))
    bos = [0] if add_bos_token or post_processor or BOS in text else []
    assert codec.encode(text) == bos + codec.encode(text.removeprefix(BOS), False) + [1] * post_processor
    assert codec.encode(text, add_special=False) == codec._tokenizer.encode(text, add_special_tokens=False).ids
