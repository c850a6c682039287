"""The tokenizer of a folder without tokenizer.json: tokenizer.model, tekken.json, or vocab.json with merges.txt.

All are read as the metadata that a GGUF file has of them, so that folder and file of a model give the same tokens.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf
from numba_atomflow.sources.json_file import flag, parse_json, read_file
from numba_atomflow.sources.sentencepiece_model import sentencepiece_fields
from numba_atomflow.sources.tekken import tekken_fields
from numba_atomflow.text.codec import TextAssets

SENTENCEPIECE = "tokenizer.model"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
TEKKEN_FILE = "tekken.json"
VOCABULARY_FILES = (SENTENCEPIECE, TEKKEN_FILE, VOCABULARY, MERGES)
# Vocabularies in other formats, which transformers converts to tokenizer.json.
OTHER_TOKENIZERS = ("tiktoken.model", "spiece.model")

_NORMAL, _CONTROL = 1, 3  # types of tokens in a GGUF file
_MARKER = re.compile(r"<\|.+\|>", re.DOTALL)  # no vocabulary learns such tokens from text
_MAX_TOKENS = 1 << 21  # above the needs of any model; an id is an index of a list


class FolderVocabulary(NamedTuple):
    """A tokenizer that was read from files other than tokenizer.json.

    Attributes:
        path: the file, for messages.
        files: all files that were read.
        assets: the tokenizer.json made from them, the special tokens that they name, warnings.
    """

    path: Path
    files: tuple[Path, ...]
    assets: TextAssets


def folder_vocabulary(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], config_path: Path
) -> FolderVocabulary | None:
    """The tokenizer of a folder without tokenizer.json; None if it holds none.

    Args:
        folder: the model's folder.
        config: its config.json.
        tokenizer_config: its tokenizer_config.json.
        config_path: of the latter, for messages.

    Raises:
        SourceError: a file is damaged or missing, two tokenizers are there, or the kind is not supported.
    """
    found = [name for name in (*VOCABULARY_FILES, *OTHER_TOKENIZERS) if (folder / name).exists()]
    known = [name for name in found if name in VOCABULARY_FILES]
    if not known:
        if found:
            raise SourceError(
                f"{folder} holds its tokenizer as {found[0]}, but no tokenizer.json; make one with transformers "
                "(AutoTokenizer.from_pretrained and save_pretrained), or remove that file if token ids are enough."
            )
        return None
    if len(known) > 1 and known != [VOCABULARY, MERGES]:
        raise SourceError(
            f"{folder} holds two tokenizers, {known[0]} and {known[1]}, and no tokenizer.json; remove the one "
            "that is not the model's."
        )
    if known == [SENTENCEPIECE]:
        path = folder / SENTENCEPIECE
        fields = sentencepiece_fields(path, read_file(path))
        prefix = flag(config_path, tokenizer_config, "add_prefix_space", fields["tokenizer.ggml.add_space_prefix"])
        fields["tokenizer.ggml.add_space_prefix"] = prefix
        return FolderVocabulary(path, (path,), assets_from_gguf(fields, path))
    if known == [TEKKEN_FILE]:
        path = folder / TEKKEN_FILE
        return FolderVocabulary(path, (path,), assets_from_gguf(tekken_fields(path, read_file(path)), path))
    if len(known) == 1:
        missing = MERGES if known == [VOCABULARY] else VOCABULARY
        raise SourceError(f"{folder} holds {known[0]} without {missing}; get the complete tokenizer.")
    path = folder / VOCABULARY
    fields = _merged_fields(folder) | {"general.architecture": config.get("model_type")}
    if str(tokenizer_config.get("tokenizer_class")).startswith("Qwen2Tokenizer"):
        fields["tokenizer.ggml.pre"] = "qwen2"
    return FolderVocabulary(path, (path, folder / MERGES), assets_from_gguf(fields, path))


def _merged_fields(folder: Path) -> dict[str, Any]:
    """The GGUF metadata of vocab.json and merges.txt: byte-level BPE.

    Raises:
        SourceError: a file is damaged.
    """
    path = folder / VOCABULARY
    tokens: dict[int, str] = {}
    for token, token_id in parse_json(path, read_file(path)).items():
        if type(token_id) is not int or not 0 <= token_id < _MAX_TOKENS:
            raise SourceError(f"{path} gives the token {quote(token)} the id {quote(token_id)}; get the file again.")
        if token_id in tokens:
            raise SourceError(
                f"{path} gives {quote(tokens[token_id])} and {quote(token)} the same id {token_id}; get the file again."
            )
        tokens[token_id] = token
    if not tokens:
        raise SourceError(f"{path} lists no tokens; get the file again.")
    try:
        lines = read_file(folder / MERGES).decode().split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{folder / MERGES} is not UTF-8 (byte {error.start}); get the file again.") from error
    merges = [line.removesuffix("\r") for line in lines]
    if merges[0].startswith("#version"):
        del merges[0]
    merges = [merge for merge in merges if merge]
    ids = set(tokens.values())
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise SourceError(
                f"{folder / MERGES} has the merge {short(merge)}, which is not one of two tokens of {VOCABULARY} to a "
                "third; get both files of one model."
            )
    listed = [tokens.get(i, "") for i in range(max(tokens, default=-1) + 1)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": [_CONTROL if _MARKER.fullmatch(token) else _NORMAL for token in listed],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,  # tokenizer_config.json says it
    }
