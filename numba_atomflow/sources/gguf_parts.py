"""GGUF files that are split into parts, as llama.cpp's gguf-split writes them: ``name-00001-of-00003.gguf``.

Each part is a GGUF file with tensors of its own. The first has the metadata of the model; all have ``split.no`` (from
0), ``split.count`` and ``split.tensors.count`` (of all parts).
"""

import re
from dataclasses import replace
from pathlib import Path

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short
from numba_atomflow.sources.gguf_fields import GgufFields
from numba_atomflow.sources.gguf_file import GgufFile, GgufTensor, read_gguf_file

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def part_names(name: str) -> list[str]:
    """The file names of all parts of a model, from the name of any of them; a name of another form by itself."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def read_gguf_model(path: Path) -> GgufFile:
    """The metadata and all tensors of a model, from its file or from any of its parts.

    Raises:
        SourceError: a file is damaged, a part is missing, or the parts are not those of one model.
    """
    file = read_gguf_file(path)
    count = GgufFields(file.fields, path).integer("split.count", 1)
    if count <= 1:
        return file
    paths = [path.parent / name for name in part_names(path.name)]
    if len(paths) != count:
        raise SourceError(
            f"{path} is one of {count} parts of a model, but its name does not end in -00001-of-{count:05d}.gguf; "
            "give the parts the names under which they were published."
        )
    for number, part in enumerate(paths, 1):
        if not part.exists():
            raise SourceError(f"{part} is missing, part {number} of the {count} of a model; get all parts.")
    return _joined([file if part == path else read_gguf_file(part) for part in paths])


def _joined(parts: list[GgufFile]) -> GgufFile:
    """One file of the tensors of all parts, with the metadata of the first.

    Raises:
        SourceError: the parts are not those of one model.
    """
    first = parts[0]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        fields = GgufFields(part.fields, part.path)
        for key, expected in (("split.no", number), ("split.count", len(parts))):
            if fields.integer(key) != expected:
                raise SourceError(
                    f"{part.path} has {key} {fields.integer(key)}, but by its name it is {expected}; get the parts of "
                    "one model again."
                )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise SourceError(
                    f"{part.path} holds the tensor {short(name)}, which {tensors[name].path.name} holds as well; get "
                    "the parts of one model again."
                )
            tensors[name] = tensor
    total = GgufFields(first.fields, first.path).integer("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise SourceError(
            f"{first.path} says that all parts have {total} tensors, but they have {len(tensors)}; get the parts of "
            "one model again."
        )
    return replace(first, tensors=tensors, paths=tuple(part.path for part in parts))
