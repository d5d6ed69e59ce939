"""Numbers as people read them."""

import pytest

from ml.report.words import byte_size, count, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.021, "0.02 s"), (9.84, "9.8 s"), (88, "88 s"), (312, "5.2 min"), (11_160, "3.1 h"), (None, "–")],
)
def test_durations(seconds: float | None, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(900, "900 bytes"), (23_100_000, "23.1 MB"), (442e6, "442 MB"), (25.3e9, "25.3 GB"), (None, "–")],
)
def test_sizes(num_bytes: float | None, words: str):
    assert byte_size(num_bytes) == words


def test_counts():
    assert count(22_713_986) == "22,713,986"
    assert count(None) == "–"
