"""Which split, which metrics and which words the table shows."""

import pytest

from ml.artifacts import ClauseResult, Interval
from ml.report.comparison import clause_words, compare, half_width, metric_title
from tests.ml.report.example_runs import deployed_english, deployed_uncompressed, failed_in_training, rejected_below_baseline


def test_test_metrics_are_shown_when_every_scored_model_has_them():
    comparison = compare(deployed_english().outcome())
    assert (comparison.split, comparison.num_rows) == ("test", 1706)


def test_one_split_for_all_rows_when_only_some_were_scored_on_test():
    run = deployed_english()
    only_baseline = tuple(item for item in run.records.test if item.variant == "baseline")
    outcome = type(run)(run.config, run.records.model_copy(update={"test": only_baseline})).outcome()
    comparison = compare(outcome)
    assert (comparison.split, comparison.num_rows) == ("validation", 851)
    found = comparison.interval(comparison.rows[0], "accuracy")
    assert found is not None
    assert found.value == pytest.approx(0.78)


def test_metrics_of_one_class_stay_out_of_the_table():
    comparison = compare(deployed_english().outcome())
    assert comparison.metrics == ("accuracy", "precision", "recall", "f1")
    assert {"accuracy", "f1"} <= comparison.percent


def test_a_metric_beyond_one_is_not_shown_in_percent():
    run = deployed_english()
    changed = []
    for item in run.records.test:
        metrics = {"perplexity": Interval(value=12.5, low=12.0, high=13.0)}
        changed.append(item.model_copy(update={"quality": item.quality.model_copy(update={"metrics": metrics})}))
    outcome = type(run)(run.config, run.records.model_copy(update={"test": tuple(changed)})).outcome()
    comparison = compare(outcome)
    assert comparison.percent == frozenset()
    assert comparison.in_units("perplexity", Interval(value=12.5, low=12.0, high=13.0)).value == 12.5


def test_verdicts_say_what_became_of_each_row():
    comparison = compare(deployed_english().outcome())
    words = {row.name: comparison.verdict(row) for row in comparison.rows}
    assert words["baseline"].words == "baseline"
    assert words["pytorch_fp32"].words == "reference"
    assert words["onnx_fp32"].words == "not compressed"
    assert words["dynamic_int8"].kind == "passes"
    assert (words["static_int8"].kind, words["static_int8"].words) == ("chosen", "deployed")
    assert words["magnitude_pruning"].words == "fails latency +1"
    assert words["static_int8_pct"].kind == "failed"


def test_an_export_that_is_served_is_called_deployed():
    comparison = compare(deployed_uncompressed().outcome())
    words = {row.name: comparison.verdict(row).words for row in comparison.rows}
    assert words["onnx_fp32"] == "deployed"
    assert words["static_int8"] == "fails loss"


def test_nothing_is_called_deployed_after_a_rejection():
    comparison = compare(rejected_below_baseline().outcome())
    assert {comparison.verdict(row).kind for row in comparison.rows}.isdisjoint({"chosen"})


def test_a_run_without_scores_has_nothing_to_show():
    assert not compare(failed_in_training().outcome()).has_results
    assert compare(deployed_english().outcome()).has_results


def test_names_and_clauses_in_words():
    assert metric_title("f1") == "F1"
    assert metric_title("recall_positive") == "Recall positive"
    assert clause_words(ClauseResult(clause="max_latency_ratio", limit=0.6, found=0.314, passed=True)) == "latency ratio 0.31, limit 0.60"
    assert clause_words(ClauseResult(clause="max_new_thing", limit=1, found=2, passed=False)) == "max new thing 2.00, limit 1.00"
    assert half_width(Interval(value=0.8, low=0.7, high=0.84)) == pytest.approx(0.07)
