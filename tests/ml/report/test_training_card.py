import re

import numpy as np
import pytest

from ml.report.training_card import render_card
from ml.report.training_pictures import MAX_RANKS, step_times
from ml.report.training_words import early_stop, early_stop_words, seconds_left
from tests.ml.training.metric_lines import healthy_ranks, learning_curve, loss_lines, meter_lines, validation_lines


def test_the_card_of_a_healthy_training():
    random = np.random.default_rng(0)
    history = loss_lines(learning_curve(random, 300), num_steps=900) + validation_lines([0.6, 0.5], every=150)
    card = render_card("my_reviews", history, healthy_ranks(random), num_steps=900)
    assert "**my\\_reviews: step 300 of 900 (33 %), loss 0." in card
    assert "validation loss 0.5000, accuracy 90.0 %, at most 60 s left**" in card
    assert "nothing is wrong" in card
    assert card.count("](data:image/svg+xml;base64,") == 3
    assert len(card) < 120_000
    rows = [line for line in card.splitlines() if re.match(r"\| [01] \|", line)]
    assert len(rows) == 2
    assert all(re.search(r"\| 9\d ms \|.* 16\d rows|\| 1?\d\d ms \|", row) for row in rows)
    assert all("| – | – |" in row for row in rows)  # no GPU here


def test_the_card_says_what_is_wrong():
    random = np.random.default_rng(0)
    metrics = {rank: meter_lines(random, rank, data_wait_share=0.6, data_seconds=0.1) for rank in range(2)}
    card = render_card("reviews", loss_lines(learning_curve(random, 50)), metrics, num_steps=50)
    assert "- **input-bound** (warning): all ranks wait for data 60 % of each step \\(100 ms\\). To do: raise train.prefetch" in card


def test_the_card_before_the_first_step():
    card = render_card("reviews", [], {}, num_steps=None)
    assert "no step is done yet" in card
    assert "No figures of the ranks yet" in card


def test_of_many_ranks_the_slowest_are_drawn():
    random = np.random.default_rng(0)
    latest = {rank: meter_lines(random, rank, num_ranks=40, num_lines=1)[0] for rank in range(40)}
    latest[39]["forward_seconds"] = 0.2
    svg = step_times(latest)
    assert svg is not None
    assert len(re.findall(r">rank \d+<", svg)) == MAX_RANKS
    assert ">rank 39<" in svg
    assert step_times({}) is None


def test_what_early_stopping_saved():
    history = loss_lines(np.full(120, 0.5))
    stop = early_stop(history, {"num_steps": 600})
    assert stop is not None
    assert stop.num_steps_saved == 480
    assert stop.seconds == pytest.approx(48.0)
    assert stop.share == pytest.approx(0.8)
    assert early_stop_words(stop) == "Stopped at step 120 of 600: 480 steps not done, about 48 s (80 % of the plan) saved."


def test_nothing_was_saved_by_a_training_that_went_to_its_end():
    history = loss_lines(np.full(120, 0.5))
    assert early_stop(history, {"num_steps": 120}) is None
    assert early_stop([], {"num_steps": 120}) is None
    assert early_stop(history, {}) is None


def test_the_time_left_follows_the_latest_pace():
    history = loss_lines(np.full(100, 0.5))
    for line in history[51:]:
        line["seconds"] += 0.4 * (line["step"] - 50)
    assert seconds_left(history, 200) == pytest.approx(50.0)
    assert seconds_left(history, 100) == 0
    assert seconds_left(history[:2], 200) is None
    assert seconds_left(history, None) is None
