"""Arguments: NumPy's numbers, None for the default, and values that are refused by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.batch import generate_batch
from numba_atomflow.constraints import Choice, Grammar, Regex
from numba_atomflow.convert import convert
from numba_atomflow.errors import AtomFlowError, BackendError, ContextError, OptionError
from numba_atomflow.perf.bench import Settings
from numba_atomflow.utils.arguments import file_path, real_number, truth_value, whole_number, whole_numbers
from numba_atomflow.validate import check_widths, record_steps


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine.random(
        tiny_geometry(), "cpu", max_seq_len=np.int64(32), threads=np.int32(1), seed=np.uint8(3)
    ) as engine:
        yield engine


@pytest.mark.parametrize("value", [4, np.int8(4), np.uint64(4), np.array(4)])
def test_whole_numbers_of_every_kind(value: object) -> None:
    number = whole_number("n", value)
    assert number == 4
    assert type(number) is int


@pytest.mark.parametrize("value", [4.0, np.float64(4), True, np.bool_(True), "4", None, 4j, np.array([4]), [4]])
def test_values_that_are_not_whole_numbers(value: object) -> None:
    with pytest.raises(OptionError, match=r"^n is .*; it must be a whole number\.$"):
        whole_number("n", value)


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.float32(0.5), np.array(0.5)])
def test_real_numbers_of_every_kind(value: object) -> None:
    number = real_number("x", value)
    assert number == 0.5
    assert type(number) is float


@pytest.mark.parametrize("value", [True, np.bool_(False), "0.5", None, 1j, np.complex64(1), np.array([0.5])])
def test_values_that_are_not_real_numbers(value: object) -> None:
    with pytest.raises(OptionError, match=r"^x is .*; it must be a number\.$"):
        real_number("x", value)


def test_numbers_beyond_float_are_infinite() -> None:
    assert real_number("x", 10**400) == np.inf
    assert real_number("x", -(10**400)) == -np.inf


def test_a_bool_is_not_a_number() -> None:
    assert truth_value("t", np.bool_(True)) is True
    with pytest.raises(OptionError, match="t is 1; it must be True or False"):
        truth_value("t", 1)


@pytest.mark.parametrize("value", [None, 5, b"x", "", "a\0b", "\ud800", ["x"]])
def test_invalid_file_names_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"^model is .*; it must be the path of a file"):
        file_path("model", value)
    assert file_path("model", "x") == file_path("model", Path("x")) == Path("x")


# --- sampling --------------------------------------------------------------------------------------------------------


def test_none_is_the_default_of_every_option() -> None:
    names = SamplingParams.__dataclass_fields__
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()  # type: ignore[arg-type]


def test_options_are_kept_as_pythons_own() -> None:
    given = {
        "temperature": np.float32(0.5),
        "top_k": np.int8(3),
        "top_p": np.float64(0.5),
        "min_p": 0,
        "repetition_penalty": 1,
        "seed": np.uint64(2**64 - 1),
        "max_tokens": np.int64(4),
        "stop": np.array(["a", "b"]),
        "ignore_eos": np.bool_(True),
    }
    params = SamplingParams(**given)  # type: ignore[arg-type]
    kept = [params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty, params.seed]
    kept += [params.max_tokens, params.stop, params.ignore_eos]
    assert kept == [0.5, 3, 0.5, 0.0, 1.0, 2**64 - 1, 4, ("a", "b"), True]
    assert [type(value) for value in kept] == [float, int, float, float, float, int, int, tuple, bool]
    assert {type(text) for text in params.stop} == {str}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"temperature": 10**400}, "temperature is inf"),
        ({"top_k": 3.0}, "top_k is 3.0; it must be a whole number"),
        ({"top_k": 2**4000}, "top_k is .*; it must be 0"),
        ({"seed": True}, "seed is True"),
        ({"max_tokens": np.float64(3)}, r"max_tokens is np.float64\(3.0\); it must be a whole number"),
        ({"stop": 5}, "stop is 5; it must be a string, or a list of strings"),
        ({"stop": b"a"}, "stop is b'a'"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}"),
        ({"stop": ["a", 5]}, "stop holds"),
        ({"ignore_eos": "yes"}, "ignore_eos is 'yes'"),
    ],
)
def test_types_are_checked_before_ranges(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        SamplingParams(**options)


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids", [(1, 2), np.array([1, 2], np.uint64), [np.uint64(1), np.int64(2)], [np.array(1), 2], range(1, 3)]
)
def test_token_ids_of_every_kind_are_the_same(engine: Engine, ids: Sequence[int]) -> None:
    engine.reset()
    expected = engine.feed([1, 2])
    engine.rewind(np.int64(0))
    np.testing.assert_array_equal(engine.feed(ids), expected)
    assert engine.token_ids == [1, 2]
    assert {type(token) for token in engine.token_ids} == {int}


@pytest.mark.parametrize(
    "ids", [np.array(3), [True, 2], [1.0], [1, None], "ab", b"ab", {1: 2}, None, 5, [[1, 2], [3]], np.array([[1]])]
)
def test_values_that_are_not_token_ids(engine: Engine, ids: Any) -> None:
    with pytest.raises(OptionError, match="Token ids must be a flat list of whole numbers, not"):
        engine.feed(ids)


@pytest.mark.parametrize("position", [0.0, True, None, "0"])
def test_a_position_is_a_whole_number(engine: Engine, position: Any) -> None:
    with pytest.raises(OptionError, match="position is"):
        engine.rewind(position)


def test_options_of_a_reply_are_sampling_params(engine: Engine) -> None:
    with pytest.raises(OptionError, match=r"params is \{'max_tokens': 3\}; give SamplingParams"):
        engine.generate_tokens([1], {"max_tokens": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"max_seq_len": True}, {"max_seq_len": 2.0}, {"threads": "2"}, {"threads": 10**30}, {"seed": None}]
)
def test_an_engines_numbers_are_whole(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"{name} is"):
        Engine.random(tiny_geometry(), "cpu", **options)


def test_a_geometry_is_required() -> None:
    with pytest.raises(OptionError, match="geometry is None"):
        Engine.random(None)  # type: ignore[arg-type]


def test_settings_of_a_measurement_are_whole_numbers() -> None:
    assert Settings(prompt_tokens=np.int64(8), depths=(np.int64(0),)) == Settings(prompt_tokens=8)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"repeats is 1\.5"):
        Settings(repeats=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"destination": None}, "destination is None"),
        ({"source": None}, "source is None"),
        ({"method": "best"}, "There is no method 'best'; choose rtn, awq, gptq"),
        ({"head": None}, "head is None; choose fp8 or fp16"),
        ({"method": "gptq", "calibration": 5}, "calibration is 5"),
    ],
)
def test_arguments_of_a_conversion_are_checked(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        convert(**{"source": str(tmp_path / "source"), "destination": str(tmp_path / "made"), **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [range(3), (0, 1, 2), iter([0, 1, 2]), np.arange(3), [np.int64(0), 1, np.uint8(2)]])
def test_token_ids_of_every_kind(ids: Any) -> None:
    found = whole_numbers(ids)
    assert found == [0, 1, 2]
    assert {type(token) for token in found} == {int}


NO_TOKENS = [None, 5, "text", b"text", {1: 2}, [1.0], [True], ["1"], [[1]], [None], np.array(5), np.zeros((2, 2)), 1j]


@pytest.mark.parametrize("ids", NO_TOKENS, ids=repr)
def test_what_is_no_list_of_token_ids(ids: Any) -> None:
    with pytest.raises(OptionError, match=r"^Token ids must be a flat list of whole numbers, not "):
        whole_numbers(ids)


def _arrays() -> list[Any]:
    return [np.array([1, 2]), np.zeros((2, 2)), np.array([], int), np.array(5)]


@pytest.mark.parametrize("value", _arrays(), ids=repr)
def test_an_array_is_no_name(value: Any) -> None:
    for option, error in (("backend", BackendError), ("decode", OptionError), ("prefill", OptionError)):
        with pytest.raises(error):
            Engine.random(tiny_geometry(), **{option: value})
    with pytest.raises(OptionError, match=r"speculate is .*; it must be"):
        SamplingParams(speculate=value)


@pytest.mark.parametrize("value", _arrays(), ids=repr)
def test_an_array_says_neither_yes_nor_no(engine: Engine, value: Any) -> None:
    with pytest.raises(OptionError, match=r"all_logits is .*; it must be True or False"):
        engine.feed([1], value)


@pytest.mark.parametrize("value", ["a" * 100_000, [1] * 10_000, 10**5000], ids=["text", "list", "number"])
def test_a_message_names_a_long_value_in_short(value: Any) -> None:
    for option in ("backend", "decode", "prefill", "prefill_chunk", "device"):
        with pytest.raises(AtomFlowError) as caught:
            Engine.random(tiny_geometry(), **{"backend": "cpu", option: value})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("make", [Regex, Grammar, lambda text: Choice([text])], ids=["Regex", "Grammar", "Choice"])
def test_half_of_a_surrogate_pair_is_no_constraint(make: Any) -> None:
    with pytest.raises(OptionError, match="half of a surrogate pair"):
        make("a\ud800")


@pytest.mark.parametrize("value", [*_arrays(), None, 5, "x", [1]], ids=repr)
def test_what_is_no_mapping_of_edits_or_no_yes_or_no(engine: Engine, tmp_path: Path, value: Any) -> None:
    with pytest.raises(OptionError, match="Edits are a mapping"), engine.edit(value):
        pass
    with pytest.raises(OptionError, match=r"overwrite is .*; it must be True or False"):
        engine.save_state(tmp_path / "s.kv", overwrite=value)
    with pytest.raises(OptionError, match="head is "):
        convert(tmp_path, tmp_path / "c.safetensors", head=value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [*_arrays(), 5, "x", [1], True], ids=repr)
def test_what_are_no_options_of_a_batch(tmp_path: Path, value: Any) -> None:
    with pytest.raises(OptionError, match=r"params is .*; give SamplingParams"):
        generate_batch([{"prompt": "a"}], tmp_path / "out", params=value)


@pytest.mark.parametrize("widths", [None, 5, "12", [1.0], [True], np.array(5), np.zeros((2, 2))], ids=repr)
def test_widths_to_check_are_whole_numbers(engine: Engine, widths: Any) -> None:
    with pytest.raises(OptionError, match="flat list of whole numbers"):
        check_widths(engine.backend, engine.geometry, [1], widths)


@pytest.mark.parametrize("steps", [None, 1.0, True, "1", -1, np.array([1])], ids=repr)
def test_steps_to_record_are_a_whole_number(engine: Engine, steps: Any) -> None:
    with pytest.raises(OptionError, match="decode_steps is "):
        record_steps(engine.backend, engine.geometry, [1], steps)
    with pytest.raises(ContextError, match="do not fit into the context, which holds 32"):
        record_steps(engine.backend, engine.geometry, [1], 10**30)
