"""Validation of models with biases or norms of q and k: correct ones pass, faults are attributed to Qkv."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_geometries import FIELDS, family_geometry, family_weights
from numpy.typing import NDArray
from tiny_models import tiny_geometry, write_gguf
from validator_models import BLOCK, PROMPT, Subject, make_subject, three_layers

pytest.importorskip("transformers", reason="transformers makes the ground truth: pip install '.[validate]'")

from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import GroundTruthError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.validate import check, make_ground_truth, record

Weights = dict[str, NDArray[Any]]


@pytest.fixture(scope="module", params=["qkv_bias", "qk_norm"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    # 5 heads of 80: hidden is neither their width nor a multiple of their number, which a Llama's must be
    geometry = three_layers(heads=5, kv_heads=1, head_dim=80, **{request.param: True})
    subject = make_subject(tmp_path_factory.mktemp(request.param), geometry)
    yield subject
    subject.checkpoint.close()


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("block", [None, BLOCK, 1])
def test_a_correct_model_passes(subject: Subject, block: int | None, isolate: bool) -> None:
    report = check(subject.backend(), subject.truth, block=block, isolate=isolate)
    assert report.verdict() == "PASS: 12/12 probes, 19/19 inner stages."
    assert report.logits is not None
    assert report.logits.max_kl < 1e-9


def test_the_ground_truth_of_the_original_weights(subject: Subject) -> None:
    truth = make_ground_truth(subject.checkpoint, subject.truth.tokens[:20], 0, "original", subject.folder)
    report = check(subject.backend(), truth)
    assert report.passed, report.verdict()
    assert max(probe.relative_l2 for probe in report.probes) > 1e-3  # FP8 is somewhere in between


@pytest.mark.parametrize(
    "geometry",  # transformers does not take vocabulary and head_dim from where this reader does
    [
        tiny_geometry(vocabulary=260, hidden=256, qkv_bias=True),
        tiny_geometry(vocabulary=260, head_dim=128, qk_norm=True),
    ],
    ids=["qwen2", "qwen3"],
)
def test_a_gguf_file_as_read_by_transformers(tmp_path: Path, geometry: ModelGeometry) -> None:
    """Rows of q and k are in the order of transformers' reader."""
    source = tmp_path / "model.gguf"
    write_gguf(source, geometry, tokenizer=True)
    with Checkpoint.open(convert(source, tmp_path / "out.safetensors")) as checkpoint:
        truth = make_ground_truth(checkpoint, [token % 260 for token in PROMPT], 0, "original", source)
        weights = {name: checkpoint.array(name) for name in checkpoint.names() if name != "tokenizer.json"}
        report = check(CpuBackend(geometry, weights, len(PROMPT)), truth)
    assert report.passed, report.verdict()
    assert next(probe for probe in report.probes if probe.name == "layer.0.q").relative_l2 < 0.1


def bias_left_out(weights: Weights) -> None:
    weights["layer.1.qkv_bias"] = np.zeros_like(weights["layer.1.qkv_bias"])


def bias_of_k_and_v_swapped(weights: Weights) -> None:
    q, k, v = np.split(weights["layer.1.qkv_bias"], [400, 480])
    weights["layer.1.qkv_bias"] = np.concatenate([q, v, k])


def norm_of_k_left_out(weights: Weights) -> None:
    weights["layer.1.k_norm"] = np.ones_like(weights["layer.1.k_norm"])


def norms_of_q_and_k_swapped(weights: Weights) -> None:
    weights |= {"layer.1.q_norm": weights["layer.1.k_norm"], "layer.1.k_norm": weights["layer.1.q_norm"]}


@pytest.mark.parametrize(
    ("subject", "corrupt"),
    [
        ("qkv_bias", bias_left_out),
        ("qkv_bias", bias_of_k_and_v_swapped),
        ("qk_norm", norm_of_k_left_out),
        ("qk_norm", norms_of_q_and_k_swapped),
    ],
    indirect=["subject"],
)
@pytest.mark.parametrize("isolate", [False, True])
def test_a_fault_is_attributed_to_the_projection(
    subject: Subject, corrupt: Callable[[Weights], None], isolate: bool
) -> None:
    weights = subject.weights
    corrupt(weights)
    for values in weights.values():
        values.flags.writeable = False  # as in a mapped file; for writable arrays numba would compile kernels again
    report = check(subject.backend(weights), subject.truth, isolate=isolate, block=BLOCK)
    assert report.fault is not None
    assert report.fault.op == "layer.1.qkv", report.verdict()


def test_a_model_that_transformers_does_not_have_is_compared_with_itself(subject: Subject) -> None:
    both = three_layers(heads=5, kv_heads=1, head_dim=80, qkv_bias=True, qk_norm=True)
    with pytest.raises(GroundTruthError, match="both a bias and norms of q and k; compare backends instead"):
        make_ground_truth(WithGeometry(both), [1, 2, 3], 0)  # type: ignore[arg-type]
    seen = record(subject.backend(), subject.geometry, subject.truth.tokens[:20], 2)
    assert check(subject.backend(), seen, block=1).passed


class WithGeometry:
    """The part of a checkpoint that is read before the error."""

    def __init__(self, geometry: Any) -> None:
        self.geometry = geometry


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Subject]]:
    """A model of each family, made on first use."""
    with ExitStack() as made:

        @cache
        def of(family: str) -> Subject:
            geometry = family_geometry(family)
            subject = make_subject(tmp_path_factory.mktemp(family), geometry, family_weights(geometry))
            made.callback(subject.checkpoint.close)
            return subject

        yield of


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("family", FIELDS)
def test_families_with_other_layers(families: Callable[[str], Subject], family: str, isolate: bool) -> None:
    subject = families(family)
    report = check(subject.backend(), subject.truth, isolate=isolate, block=BLOCK)
    assert report.verdict().startswith("PASS: "), report.verdict()
