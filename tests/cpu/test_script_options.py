"""Scripts refuse wrong numbers and models: exit code 2 and a sentence, before anything is measured."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

WRONG = [
    ("bench_numpy", "-n 0", "argument -n/--tokens: '0' is no whole number from 1 on"),
    ("bench_numpy", "-p 0", "--prompt-tokens: '0'"),
    ("bench_numpy", "-r x", "--repeats: 'x'"),
    ("bench_batch", "--prompts 0", "--prompts: '0'"),
    ("bench_batch", "--max-tokens -1", "--max-tokens: '-1'"),
    ("bench_batch", "--actors 0", "--actors: '0'"),
    ("bench_batch", "no-such-model", "bench_batch: There is no model 'no-such-model'"),
    ("bench_busy", "-t 0", "threads is 0; this machine allows"),
    ("bench_busy", "--llama-bench /no/such", "--llama-bench /no/such is no program"),
    ("fp8_activations", "--windows 0", "--windows: '0'"),
    ("fuzz", "--count 0", "--count: '0'"),
    ("fuzz", "--seed -1", "--seed: '-1'"),
    ("mask_cost", "--replies x", "--replies: 'x'"),
    ("bench_prefill", "--budget nan", "--budget and --case-seconds must be positive"),
    ("soak", "--backend cpu --prompt 99999999999", "soak: max_seq_len is 100000000399"),
    ("release_cost", "no-such-model --turns 1", "release_cost: There is no model 'no-such-model'"),
]


@pytest.mark.parametrize(("script", "arguments", "said"), WRONG, ids=[" ".join(case[:2]) for case in WRONG])
def test_a_wrong_option_is_refused(script: str, arguments: str, said: str) -> None:
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("vocabularies", ["1", "600000", "49152,99999999999"])
def test_a_vocabulary_that_the_sampling_kernel_cannot_do_is_refused(vocabularies: str) -> None:
    pytest.importorskip("numba_cuda", reason="the CUDA backend's; there is none for macOS")
    with pytest.raises(SystemExit) as left:
        importlib.import_module("bench_sampling").main(["--vocabularies", vocabularies])
    assert left.value.code == 2


def test_a_whole_number_from_a_least_one_on() -> None:
    parse = importlib.import_module("number_lists").at_least(2)
    assert [parse("2"), parse("30")] == [2, 30]
