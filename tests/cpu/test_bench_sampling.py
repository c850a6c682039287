"""scripts/bench_sampling.py: its logits and its table."""

import numpy as np
import pytest
from bench_sampling import DISTRIBUTIONS, FILTERS, logits_of, table

SHARES = {
    "normal": (0.0002, 0.02),
    "half normal": (0, 0.002),
    "normal x 3": (0.02, 0.9),
    "Zipf": (0.2, 0.6),
    "equal": (0, 1e-4),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_most_likely_token_has_the_share_that_it_should_have(distribution: str) -> None:
    logits = logits_of(distribution, 49152, np.random.default_rng(1))
    assert logits.dtype == np.float32
    assert logits.shape == (49152,)
    weights = np.exp(logits.astype(np.float64))
    least, most = SHARES[distribution]
    assert least <= weights.max() / weights.sum() <= most


def test_the_table_says_where_a_token_is_wrong() -> None:
    good = {"vocabulary": 300, "distribution": "equal", "us": 12.34, "same_tokens": 3, "draws": 3}
    records = [{**good, "filter": name, "same_tokens": 3 - (name == "both")} for name in FILTERS]
    row = table(records).splitlines()[1]
    assert row.split() == ["300", "equal", "12.3", "12.3", "12.3", "12.3", "12.3", "WRONG", "12.3", "12.3"]
