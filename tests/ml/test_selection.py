import pytest

from ml.artifacts import Evaluation, Interval
from ml.config import CompressionContract
from ml.selection import final_gate, select
from tests.ml.evaluation.records import make_evaluation, make_interval, make_quality, make_variant

CONTRACT = CompressionContract()
EXPORT = make_variant("onnx_fp32", "export")
ONNX = make_evaluation("onnx_fp32", make_interval(0), make_interval(0.62, 0.01), memory_ratio=0.4, file_ratio=1.0)
PYTORCH = Evaluation(variant="pytorch_fp32", quality=make_quality(0.83, None), timing=None)


def keeps(name: str, latency: float = 0.3, *, drop: float = 0.2, half_width: float = 0.01) -> Evaluation:
    return make_evaluation(name, make_interval(drop, 0.1), make_interval(latency, half_width))


def test_the_fastest_variant_that_keeps_the_contract_is_selected() -> None:
    evaluations = (PYTORCH, ONNX, keeps("static_int8", 0.31), keeps("dynamic_int8", 0.24))
    decision = select(evaluations, (EXPORT, make_variant("static_int8"), make_variant("dynamic_int8")), CONTRACT)
    assert (decision.status, decision.variant) == ("selected", "dynamic_int8")
    assert "fastest of 2" in decision.reasons[0]
    assert {clause.clause for clause in decision.clauses["static_int8"]} == {
        "max_drop_points",
        "max_latency_ratio",
        "max_memory_ratio",
        "max_file_ratio",
    }


def test_among_equally_fast_variants_the_more_accurate_one_is_selected() -> None:
    evaluations = (ONNX, keeps("a", 0.28, drop=0.4, half_width=0.02), keeps("b", 0.30, drop=0.1, half_width=0.02))
    decision = select(evaluations, (EXPORT, make_variant("a"), make_variant("b")), CONTRACT)
    assert decision.variant == "b"
    apart = (ONNX, keeps("a", 0.28, drop=0.4, half_width=0.005), keeps("b", 0.30, drop=0.1, half_width=0.005))
    assert select(apart, (EXPORT, make_variant("a"), make_variant("b")), CONTRACT).variant == "a"


@pytest.mark.parametrize(
    ("clause", "broken", "words"),
    [
        ("max_drop_points", make_evaluation("v", make_interval(1.5), make_interval(0.3)), r"points lost 1.50, 0.5 above the limit of 1.00"),
        (
            "max_latency_ratio",
            make_evaluation("v", make_interval(0), make_interval(0.7)),
            r"latency ratio 0.70, 0.1 above the limit",
        ),
        ("max_memory_ratio", make_evaluation("v", make_interval(0), make_interval(0.3), memory_ratio=0.8), r"memory ratio 0.80, 0.2 above"),
        ("max_file_ratio", make_evaluation("v", make_interval(0), make_interval(0.3), file_ratio=1.0), r"file size ratio 1.00, 0.4 above"),
    ],
)
def test_each_clause_alone_keeps_a_variant_out(clause: str, broken: Evaluation, words: str) -> None:
    decision = select((ONNX, broken), (EXPORT, make_variant("v")), CONTRACT)
    assert [result.clause for result in decision.clauses["v"] if not result.passed] == [clause]
    assert (decision.status, decision.variant) == ("uncompressed", "onnx_fp32")
    assert any(words in reason for reason in decision.reasons)


def test_a_value_on_the_limit_keeps_the_clause() -> None:
    exact = make_evaluation("v", make_interval(1.0), make_interval(0.6), memory_ratio=0.6, file_ratio=0.6)
    assert select((ONNX, exact), (EXPORT, make_variant("v")), CONTRACT).status == "selected"


def test_the_uncompressed_model_is_never_called_compressed_however_fast_it_is() -> None:
    quick = make_evaluation("onnx_fp32", make_interval(0), make_interval(0.1), memory_ratio=0.1, file_ratio=0.1)
    decision = select((quick, PYTORCH), (EXPORT,), CONTRACT)
    assert (decision.status, decision.variant) == ("uncompressed", "onnx_fp32")
    assert "onnx_fp32" not in decision.clauses


def test_without_a_winner_the_nearest_variant_is_named() -> None:
    far = make_evaluation("far", make_interval(3.0), make_interval(0.9))
    near = make_evaluation("near", make_interval(1.1), make_interval(0.3))
    decision = select((ONNX, far, near), (EXPORT, make_variant("far"), make_variant("near")), CONTRACT)
    assert "near came nearest" in decision.reasons


def test_failed_and_unmeasured_variants_are_reported_and_not_chosen() -> None:
    variants = (EXPORT, make_variant("broken", failure="out of memory"), make_variant("unseen"), make_variant("good"))
    decision = select((ONNX, keeps("good")), variants, CONTRACT)
    assert decision.variant == "good"
    assert "broken could not be made: out of memory" in decision.reasons
    assert any(reason.startswith("unseen was not fully measured") for reason in decision.reasons)
    assert set(decision.clauses) == {"good"}


def test_too_few_rows_to_tell_are_said_with_the_rows_needed() -> None:
    unsure = make_evaluation("v", make_interval(0.5, 1.5), make_interval(0.3))
    decision = select((ONNX, unsure), (EXPORT, make_variant("v")), CONTRACT)
    assert decision.status == "selected"
    # 1,000 rows give +-1.5 points; +-0.5 takes nine times as many.
    assert any("about 8,000 more rows would tell (9,000 in all)" in reason for reason in decision.reasons)


def gate(gain: float, half_width: float, *, limit: float = 0.0, loss: Interval | None = None):
    decision = select((ONNX, keeps("v")), (EXPORT, make_variant("v")), CONTRACT)
    loss = loss or make_interval(0)
    lead = make_interval(gain + loss.value, half_width)
    test = (
        Evaluation(variant="baseline", quality=make_quality(0.83 - lead.value / 100, lead, split="test")),
        Evaluation(variant="pytorch_fp32", quality=make_quality(0.83, None, split="test")),
        Evaluation(variant="v", quality=make_quality(0.83 - loss.value / 100, loss, split="test")),
    )
    return final_gate(decision, test, CONTRACT.model_copy(update={"min_gain_over_baseline_points": limit}))


def test_a_model_above_the_baseline_passes_with_the_numbers() -> None:
    decision = gate(4.0, 1.0)
    assert (decision.status, decision.variant) == ("selected", "v")
    assert "a gain of +4.00 (+3.00 to +5.00) points" in decision.reasons[-1]


def test_a_model_below_the_baseline_is_rejected() -> None:
    decision = gate(-2.0, 1.0)
    assert (decision.status, decision.variant) == ("rejected", None)
    assert "a gain of -2.00 (-3.00 to -1.00) points, at least +0.00 wanted" in decision.reasons[0]
    assert decision.clauses


def test_the_point_estimate_decides_and_doubt_is_said() -> None:
    decision = gate(-0.5, 2.0)
    assert decision.status == "rejected"
    assert "about 15,000 more rows would tell (16,000 in all)" in decision.reasons[1]
    assert gate(0.5, 2.0).status == "selected"
    assert "not settled" in gate(0.5, 2.0).reasons[-1]


def test_the_wanted_gain_is_configurable() -> None:
    assert gate(2.5, 0.3, limit=3.0).status == "rejected"
    assert gate(3.5, 0.3, limit=3.0).status == "selected"


def test_the_gain_is_that_of_the_chosen_variant_and_carries_both_uncertainties() -> None:
    decision = gate(4.0, 3.0, loss=make_interval(1.0, 4.0))
    assert "a gain of +4.00 (-1.00 to +9.00) points" in decision.reasons[-2]


def test_an_estimate_on_the_limit_promises_no_number_of_rows() -> None:
    assert "no practical number of rows" in gate(0.0, 2.0).reasons[-1]


def test_an_unmeasured_difference_is_a_clear_error() -> None:
    decision = select((ONNX, keeps("v")), (EXPORT, make_variant("v")), CONTRACT)
    test = tuple(Evaluation(variant=name, quality=make_quality(0.8, None, split="test")) for name in ("v", "baseline"))
    with pytest.raises(ValueError, match="baseline was not compared"):
        final_gate(decision, test, CONTRACT)
