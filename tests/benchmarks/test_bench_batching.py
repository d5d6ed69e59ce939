"""The benchmark of batching: all ways hold the same rows, tokens are counted right, and it runs."""

import numpy as np
import pytest

from benchmarks.bench_batching import WAYS, main, make_batches, report, tokens_of_slowest_rank

LENGTHS = np.random.default_rng(0).integers(4, 200, 500)


def test_every_way_holds_every_row_once_and_bucketed_ones_have_the_fewest_tokens() -> None:
    ways = make_batches(LENGTHS, 32, seed=0)
    for batches in ways.values():
        assert sorted(np.concatenate(batches.rows).tolist()) == list(range(500))
    tokens = [ways[name].tokens for name in WAYS]
    assert int(LENGTHS.sum()) <= tokens[0] < tokens[1] < tokens[2] == 500 * LENGTHS.max()
    assert tokens_of_slowest_rank(LENGTHS, ways[WAYS[1]])[1] < tokens_of_slowest_rank(LENGTHS, ways[WAYS[1]])[0]


def test_report_gives_ratios_to_the_bucketed_way() -> None:
    seconds = {WAYS[0]: [0.010, 0.010], WAYS[1]: [0.025, 0.025], WAYS[2]: [0.04, 0.04]}
    text = report(LENGTHS, make_batches(LENGTHS, 32, 0), seconds, "drawn", "tiny", 32, 0.0)
    assert "2.50 (2.50 to 2.50)" in text
    assert "4.00 (4.00 to 4.00)" in text


@pytest.mark.slow
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "2", "--rows", "300", "--size", "tiny"]) == 0
    assert "| 2 |" in capsys.readouterr().out
