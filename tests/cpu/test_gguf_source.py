"""GGUF files as a source: the same tensors as the Hugging Face folder, and damage."""

import os
import re
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from gguf import GGMLQuantizationType
from tiny_models import random_weights, tiny_geometry, write_gguf, write_hf_folder

from numba_atomflow.errors import AtomFlowError, GeometryError, SourceError
from numba_atomflow.rope_scaling import Llama3Scaling
from numba_atomflow.sources import gguf_file, open_source
from numba_atomflow.sources.gguf_file import read_gguf_file

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [{}, {"qkv_bias": True}, {"qk_norm": True, "hidden": 224, "heads": 6}])
def test_a_gguf_and_a_folder_of_the_same_weights_are_the_same_source(
    tmp_path: Path, tied: bool, family: dict[str, Any]
) -> None:
    geometry = tiny_geometry(tied_embeddings=tied, rope_theta=500000.0, **family)
    weights = random_weights(geometry)
    write_hf_folder(tmp_path / "hf", geometry, weights=weights)
    write_gguf(tmp_path / "model.gguf", geometry, weights=weights)
    folder, file = open_source(tmp_path / "hf"), open_source(tmp_path / "model.gguf")
    assert (folder.kind, file.kind) == ("hf", "gguf")
    assert file.geometry == folder.geometry == geometry
    assert sorted(file.names()) == sorted(folder.names()) == sorted(weights)
    for name in weights:
        assert file.shape(name) == weights[name].shape
        np.testing.assert_array_equal(file.read(name), folder.read(name), err_msg=name)
        np.testing.assert_array_equal(file.read(name), weights[name], err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_every_type_is_read_as_the_gguf_package_dequantizes_it(tmp_path: Path, kind: str) -> None:
    stored = write_gguf(tmp_path / "model.gguf", matrices=GGMLQuantizationType[kind])
    source = open_source(tmp_path / "model.gguf")
    for name, values in stored.items():
        read = source.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values, err_msg=name)


@pytest.mark.parametrize("name", [Q_PROJ, EMBEDDING, "model.norm.weight"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 70), (63, 129), (128, 192), (191, None), (40, 40)])
def test_rows_can_be_read_in_slabs(tmp_path: Path, name: str, start: int, stop: int | None) -> None:
    geometry = tiny_geometry(hidden=256)
    write_gguf(tmp_path / "model.gguf", geometry, matrices=GGMLQuantizationType.Q8_0)
    source = open_source(tmp_path / "model.gguf")
    np.testing.assert_array_equal(source.read(name, start, stop), source.read(name)[start:stop])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_its_scaling(tmp_path: Path, factor: float) -> None:
    geometry = tiny_geometry(rope_theta=500000.0, rope_scaling=Llama3Scaling(factor, 1.0, 4.0, 8192))
    write_gguf(tmp_path / "model.gguf", geometry)
    assert open_source(tmp_path / "model.gguf").geometry == geometry


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    geometry = tiny_geometry(rope_scaling=Llama3Scaling(8.0, 2.0, 3.0, 8192))
    write_gguf(tmp_path / "model.gguf", geometry)
    with pytest.raises(SourceError, match=r"rope_freqs\.weight.*not those of Llama 3"):
        open_source(tmp_path / "model.gguf")


def test_an_invalid_original_context_of_llama3(tmp_path: Path) -> None:
    geometry = tiny_geometry(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    write_gguf(tmp_path / "model.gguf", geometry, fields={"llama.rope.scaling.original_context_length": 0})
    refused(tmp_path / "model.gguf", "model.gguf", "original_max_positions is 0", error=GeometryError)


def test_tokenizer_and_template_are_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tokenizer=True)
    text = open_source(tmp_path / "model.gguf").text
    assert text.tokenizer_json is not None
    assert text.chat_template is not None
    assert text.eos_ids == (1,)


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_geometry(vocabulary=100), tokenizer=True)
    with pytest.raises(SourceError, match="260 tokens, but embeddings for 100"):
        open_source(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> gguf.GGUFReader:
    """The file, read by the gguf package."""
    return gguf.GGUFReader(smollm2_gguf)


def test_the_reader_agrees_with_that_of_the_gguf_package(smollm2_gguf: Path, reference: gguf.GGUFReader) -> None:
    actual = read_gguf_file(smollm2_gguf)
    their_fields = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert actual.fields == their_fields
    assert list(actual.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        parsed = actual.tensors[tensor.name]
        assert (parsed.type, parsed.offset, parsed.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert parsed.shape == tuple(int(n) for n in tensor.shape[::-1])


def test_smollm2(smollm2_gguf: Path, reference: gguf.GGUFReader) -> None:
    source = open_source(smollm2_gguf)
    geometry = source.geometry
    assert (geometry.layers, geometry.hidden, geometry.heads, geometry.kv_heads) == (30, 576, 9, 3)
    assert (geometry.norm_eps, geometry.rope_theta, geometry.tied_embeddings) == (1e-5, 100000.0, True)
    # Checked against the gguf package's own dequantization, in the order of the file.
    stored = next(tensor for tensor in reference.tensors if tensor.name == "blk.0.attn_q.weight")
    rows = gguf.quants.dequantize(stored.data, stored.tensor_type)
    read = source.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(read[64 + 5], rows[64 + 10])  # head 1: pair 5, first half
    np.testing.assert_array_equal(read[64 + 32 + 5], rows[64 + 11])  # and second half


# --- files that cannot be read -------------------------------------------------------------------------------------


def refused(path: Path, *fragments: str, error: type[AtomFlowError] = SourceError) -> None:
    """Opening `path` fails with one sentence that holds all the fragments."""
    with pytest.raises(error) as caught:
        open_source(path)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "none.gguf does not exist")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    refused(tmp_path / "model.gguf", "model.gguf is empty")


def test_wrong_magic(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"\x80\x02}q\x00" * 100)
    refused(tmp_path / "model.gguf", "is not a GGUF file", "b'GGUF'")


def test_a_folder_by_a_gguf_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    refused(tmp_path / "model.gguf", "model.gguf holds no config.json")


def test_a_device(tmp_path: Path) -> None:
    refused(Path("/dev/null"), "/dev/null is neither a file nor a folder")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(tmp_path / "model.gguf", "model.gguf cannot be read (Permission denied)")


def test_permission_lost_between_opening_and_reading(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    source = open_source(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(SourceError, match=r"model\.gguf cannot be read"):
        source.read(EMBEDDING)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:240000])
    for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        with pytest.raises(SourceError, match=r"model\.gguf became shorter while it was read"):
            source.read(name)


def test_truncation_at_any_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, tokenizer=True)
    data = whole.read_bytes()
    header = read_gguf_file(whole).tensors["token_embd.weight"].offset
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, header, 37), header, header + 1, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:length])
        refused(cut, "cut.gguf is truncated")


def test_a_damaged_header_raises_a_source_error(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole.gguf", tmp_path / "damaged.gguf"
    write_gguf(whole, tiny_geometry(layers=1))
    data = whole.read_bytes()
    header = read_gguf_file(whole).tensors["token_embd.weight"].offset
    rng = np.random.default_rng(0)
    outcomes = {"fine": 0, "refused": 0}
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            broken[int(rng.integers(4, header))] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)]))
        damaged.write_bytes(broken)
        try:
            open_source(damaged)
            outcomes["fine"] += 1
        except (SourceError, GeometryError):
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100, outcomes


@pytest.mark.parametrize(
    ("offset", "value", "fragment"),
    [
        (4, struct.pack("<I", 1), "GGUF version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 62), "truncated or damaged"),  # number of tensors
        (8, struct.pack("<q", -1), "truncated or damaged"),
        (16, struct.pack("<Q", 1 << 40), "truncated or damaged"),  # number of fields
        (24, struct.pack("<Q", (1 << 64) - 1), "truncated or damaged"),  # length of the first key
    ],
)
def test_invalid_counts(tmp_path: Path, offset: int, value: bytes, fragment: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    refused(path, fragment, "model.gguf")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_bytes(tensors: int, fields: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


FLAG = struct.pack("<IB", 0, 1)  # a field's value
ARRAY_OF_BYTES, ARRAY_OF_STRINGS, ARRAY_OF_ARRAYS = (struct.pack("<II", 9, kind) for kind in (0, 8, 9))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (gguf_bytes(0, 60000, (string(b"twice") + FLAG) * 60000), "lists the metadata field twice twice"),
        (gguf_bytes(60000, 0, (string(b"twice") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 60000), "the tensor twice twice"),
        (gguf_bytes(0, 70000, (string(b"a") + FLAG) * 70000), "70000 metadata fields, where 65536 are the most"),
        (gguf_bytes(0, 1, string(b"k" * 70000) + FLAG), "a string of 70000 bytes at byte 24, where 65536 are the most"),
        (gguf_bytes(0, 1, string(b"a") + ARRAY_OF_BYTES + struct.pack("<Q", 3 << 20) + bytes(3 << 20)), "an array of"),
        (gguf_bytes(0, 1, string(b"a") + ARRAY_OF_BYTES + struct.pack("<Q", 1 << 62) + bytes(99)), "announced"),
        (gguf_bytes(0, 1, string(b"a") + ARRAY_OF_STRINGS + struct.pack("<Q", 1 << 61) + bytes(99)), "announced"),
        (gguf_bytes(0, 1, string(b"a") + ARRAY_OF_ARRAYS + struct.pack("<Q", 1) + bytes(99)), "nested arrays"),
        (gguf_bytes(0, 1, string(b"a") + struct.pack("<IQ", 8, 1 << 40) + bytes(99)), "announced"),
        (gguf_bytes(0, 2, (string(b"\x1b[31m\n") + FLAG) * 2), r"the metadata field \x1b[31m\n twice"),
        (gguf_bytes(0, 1, string(b"\xff") + FLAG + bytes(99)), "not UTF-8 at byte 24"),
        (gguf_bytes(1, 0, string(b"a") + struct.pack("<I4QIQ", 4, *[1 << 63] * 4, 0, 0)), "is truncated: tensor a"),
    ],
    ids=range(12),
)
def test_malicious_headers(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", "model.gguf", fragment)


def test_a_header_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, not mapped: access to a mapped page beyond the end of the file kills the process."""
    path = tmp_path / "model.gguf"
    write_gguf(path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(gguf_file.os, "fstat", lambda _: os.stat_result([0] * 6 + [size] + [0] * 3))
    with pytest.raises(SourceError, match=r"model\.gguf became shorter while it was read"):
        read_gguf_file(path)


def test_sizes_in_a_file_are_checked_before_allocation(tmp_path: Path) -> None:
    claims = string(b"a") + ARRAY_OF_STRINGS + struct.pack("<Q", 1 << 20) + bytes(1 << 23)
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(0, 3, claims[:-1]))
    tracemalloc.start()
    try:
        refused(tmp_path / "model.gguf", "truncated")
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def patch_tensor(path: Path, name: str, at: int, value: bytes) -> None:
    """Overwrite part of a matrix's description: dimensions at 0, sizes at 4 and 12, type at 20, offset at 24."""
    data = bytearray(path.read_bytes())
    start = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + at
    data[start : start + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "value", "fragment"),
    [
        (0, struct.pack("<I", 0), "claims 0 dimensions"),
        (0, struct.pack("<I", 0xFFFFFFFF), "claims 4294967295 dimensions"),
        (4, struct.pack("<Q", 1 << 62), "truncated"),
        (4, struct.pack("<Q", 193), "overlaps"),
        (20, struct.pack("<I", 999), "type number 999"),
        (20, struct.pack("<I", int(GGMLQuantizationType.Q2_K)), "rows of 192, not a multiple of Q2_K's 256"),
        (24, struct.pack("<Q", 1 << 63), "truncated"),
        (24, struct.pack("<q", -64), "truncated"),
        (24, struct.pack("<Q", 0), "overlaps"),
        (24, struct.pack("<Q", 7), "misaligned"),
    ],
)
def test_invalid_tensor_descriptions(tmp_path: Path, at: int, value: bytes, fragment: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    patch_tensor(path, "blk.1.attn_q.weight", at, value)
    with pytest.raises(SourceError, match=fragment):
        open_source(path)


def test_a_type_that_cannot_be_dequantized(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    patch_tensor(path, "blk.1.attn_q.weight", 20, struct.pack("<I", int(GGMLQuantizationType.I32)))
    with pytest.raises(SourceError, match=r"q_proj\.weight of .*model\.gguf has type I32"):
        open_source(path).read(Q_PROJ)


def test_a_tensor_listed_twice(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    refused(path, "holds the tensor blk.0.attn_q.weight twice")


def test_a_missing_tensor(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    del weights[Q_PROJ]
    write_gguf(tmp_path / "model.gguf", weights=weights)
    refused(tmp_path / "model.gguf", f"lacks the tensor {Q_PROJ};")


def test_an_extra_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    geometry = tiny_geometry(layers=3)
    write_gguf(path, geometry, fields={"llama.block_count": 2})
    refused(path, "holds the tensor model.layers.2.", "not part of a model")
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_q_biasxx"))
    refused(path, "holds the tensor blk.0.attn_q_biasxx", "not part of a model")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", Q_PROJ])
def test_a_stray_tensor_by_a_hugging_face_name_does_not_replace_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tied: bool
) -> None:
    geometry = tiny_geometry(tied_embeddings=tied)
    weights = random_weights(geometry)
    gguf_name = tiny_models._gguf_name
    monkeypatch.setattr(tiny_models, "_gguf_name", lambda key: key[6:] if key.startswith("stray ") else gguf_name(key))
    stray = np.zeros_like(weights.get(name, weights[EMBEDDING]))
    write_gguf(tmp_path / "model.gguf", geometry, weights=weights | {f"stray {name}": stray})
    refused(tmp_path / "model.gguf", f"holds the tensor {name}", "not part of a model")


def test_a_wrong_shape(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    weights["model.layers.0.mlp.down_proj.weight"] = np.zeros((192, 352), np.float32)
    write_gguf(tmp_path / "model.gguf", weights=weights)
    refused(tmp_path / "model.gguf", "model.layers.0.mlp.down_proj.weight", "(192, 352)", "(192, 320)")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [EMBEDDING, Q_PROJ, "model.norm.weight"])
def test_nan_and_infinity_are_named_when_read(tmp_path: Path, poison: float, name: str) -> None:
    weights = random_weights(tiny_geometry())
    weights[name].flat[100] = poison
    write_gguf(tmp_path / "model.gguf", weights=weights)
    source = open_source(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=re.escape(f"Tensor {name} of {tmp_path}/model.gguf holds a NaN")):
        source.read(name)


def test_a_type_that_cannot_be_dequantized_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions, and two of them
    data[at : at + 4] = struct.pack("<I", GGMLQuantizationType.I32)
    path.write_bytes(data)
    refused(path, "Tensor model.layers.1.mlp.down_proj.weight of", "has type I32, which the gguf package cannot")


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"llama.block_count": None}, "lacks the metadata field llama.block_count"),
        ({"llama.embedding_length": None}, "lacks the metadata field llama.embedding_length"),
        ({"llama.block_count": 3}, "lacks the tensor model.layers.2.input_layernorm.weight and 8 more"),
        ({"llama.block_count": 0xFFFFFFFF}, "describes 4294967295 layers but holds only"),
        ({"llama.feed_forward_length": 256}, "mlp.gate_proj.weight"),
        ({"llama.vocab_size": 300}, "model.embed_tokens.weight"),
        ({"llama.attention.head_count": 0}, "0 attention heads"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count 32"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 2}, "one of 2 parts of a model"),
        ({"general.alignment": 48}, "general.alignment 48"),
    ],
)
def test_metadata_that_does_not_fit_the_weights(tmp_path: Path, fields: dict[str, Any], fragment: str) -> None:
    write_gguf(tmp_path / "model.gguf", fields=fields)
    refused(tmp_path / "model.gguf", fragment, "model.gguf")


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.factor": 4.0},  # no type: linear
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "longrope"},
        {"llama.rope.scale_linear": 8.0},
        {"llama.rope.scaling.attn_factor": 1.2},
        {"llama.rope.scaling.yarn_attn_factor": 0.5},
        {"llama.rope.scaling.alpha": 1000.0},
        {"llama.rope.dimension_sections": [16, 24, 24, 0]},
        {"llama.rope.freq_base_swa": 1e6},
        {"llama.rope.dimension_count_swa": 32},
        {"llama.rope.partial_factor": 0.5},  # unknown to everybody
        {"llama.attention.scale": 0.5},
        {"llama.attention.causal": False},
        {"llama.attention.clamp_kqv": 8.0},
        {"llama.final_logit_softcapping": 30.0},
        {"llama.logit_scale": 0.0625},
    ],
    ids=str,
)
def test_unsupported_settings_are_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_gguf(tmp_path / "model.gguf", fields=fields)
    refused(tmp_path / "model.gguf", "model.gguf", list(fields)[-1], "not supported")


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.factor": 0.0},  # llama.cpp: as if it were not there
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 1.0, "llama.rope.scale_linear": 4.0},  # the old name counts only by itself
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 1.0,
            "llama.rope.scaling.attn_factor": 1.0,
            "llama.rope.scaling.original_context_length": 4096,
            "llama.rope.scaling.finetuned": True,
            "llama.rope.scaling.yarn_beta_fast": 32.0,
            "llama.rope.scaling.yarn_beta_slow": 1.0,
            "llama.rope.scaling.yarn_log_multiplier": 0.1,
        },
        {"llama.rope.freq_base_swa": 10000.0, "llama.rope.dimension_count_swa": 64},
        {"llama.attention.scale": 0.125, "llama.attention.causal": True, "llama.logit_scale": 0.0},
        {"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [2, 2]},
        {"llama.feed_forward_length": [320, 320]},
    ],
    ids=str,
)
def test_neutral_settings_are_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_gguf(tmp_path / "model.gguf", fields=fields)
    assert open_source(tmp_path / "model.gguf").geometry == tiny_geometry()


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
@pytest.mark.parametrize(
    ("values", "fragment"), [([2, 4], "layers of different sizes"), ([2], "unusable"), (["2", "2"], "unusable")]
)
def test_layers_of_different_sizes(tmp_path: Path, key: str, values: list[Any], fragment: str) -> None:
    write_gguf(tmp_path / "model.gguf", fields={f"llama.{key}": values})
    refused(tmp_path / "model.gguf", "model.gguf", f"llama.{key}", fragment)


def test_unsupported_sizes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", fields={"llama.attention.head_count_kv": 3})
    refused(tmp_path / "model.gguf", "model.gguf", "3 key/value heads", error=GeometryError)


def test_unknown_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", architecture="falcon")
    refused(tmp_path / "model.gguf", "architecture 'falcon'", "'llama', 'qwen2', 'qwen3'")


@pytest.mark.parametrize(("window", "positions"), [(0, 512), (300, 300), (1000, 512)])
def test_the_context_is_limited_to_a_sliding_window(tmp_path: Path, window: int, positions: int) -> None:
    geometry = tiny_geometry(qkv_bias=True)
    write_gguf(tmp_path / "model.gguf", geometry, fields={"qwen2.attention.sliding_window": window})
    assert open_source(tmp_path / "model.gguf").geometry == replace(geometry, max_positions=positions)


@pytest.mark.parametrize(("family", "missing"), [("qkv_bias", "v_proj.bias"), ("qk_norm", "k_norm.weight")])
def test_a_model_that_lacks_what_its_family_has(tmp_path: Path, family: str, missing: str) -> None:
    geometry = tiny_geometry(**{family: True})
    weights = random_weights(geometry)
    del weights[f"model.layers.0.self_attn.{missing}"]
    write_gguf(tmp_path / "model.gguf", geometry, weights=weights)
    refused(tmp_path / "model.gguf", f"lacks the tensor model.layers.0.self_attn.{missing}")


def test_a_llama_with_a_bias_is_refused(tmp_path: Path) -> None:
    biased = tiny_geometry(qkv_bias=True)
    write_gguf(tmp_path / "model.gguf", weights=random_weights(biased))
    refused(tmp_path / "model.gguf", "holds the tensor model.layers.0.self_attn.q_proj.bias", "not part of a model")


def test_head_dim_defaults_to_hidden_over_heads(tmp_path: Path) -> None:
    geometry = replace(tiny_geometry(), hidden=256)
    dropped = dict.fromkeys(
        ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count")
    )
    write_gguf(tmp_path / "model.gguf", geometry, fields=dropped)
    assert open_source(tmp_path / "model.gguf").geometry == geometry
