"""scripts/bench_sampling.py on a GPU: it runs, and the kernels draw the tokens of `numba_atomflow.sampling`."""

import json

import pytest
from bench_sampling import DISTRIBUTIONS, FILTERS, main


def test_every_distribution_and_filter_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--vocabularies", "307,20011", "--repeats", "1", "--draws", "3", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert len(records) == 2 * len(DISTRIBUTIONS) * len(FILTERS)
    assert all(0 < record["us"] < 1e5 for record in records)
