"""The pictures: what they leave out, what they show, and that names stay names."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from ml.report.comparison import compare
from ml.report.pictures import describe_latency_quality, latency_quality, loss_curve, validation_curve
from tests.ml.report.example_runs import deployed_english, failed_in_training, training_history


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_there_is_no_picture_of_nothing():
    assert loss_curve([], None, None) is None
    assert loss_curve([{"kind": "event", "message": "x"}], None, None) is None
    assert validation_curve([{"kind": "step", "step": 1, "epoch": 0, "loss": 1.0}], None) is None
    assert latency_quality(compare(failed_in_training().outcome())) is None


def test_curves_mark_the_kept_and_the_resumed_step():
    svg = loss_curve(training_history(90, 3), 60, 30)
    assert svg is not None
    assert {"training (running mean)", "validation", "kept", "resumed", "optimizer step", "loss"} <= set(texts(svg))
    fresh = loss_curve(training_history(90, 3), 60, 0)
    assert fresh is not None
    assert "resumed" not in texts(fresh)


def test_one_validation_alone_can_be_drawn():
    svg = validation_curve([{"kind": "validation", "step": 5, "epoch": 1, "loss": 0.4, "accuracy": 0.5}], 5)
    assert svg is not None
    assert "validation accuracy, %" in texts(svg)


def test_latency_picture_names_every_measured_model():
    svg = latency_quality(compare(deployed_english().outcome()))
    assert svg is not None
    assert {"pytorch_fp32", "onnx_fp32", "dynamic_int8", "static_int8 (chosen)", "magnitude_pruning", "baseline"} <= set(texts(svg))
    assert "static_int8_pct" not in texts(svg)


@pytest.mark.filterwarnings("error")
def test_text_takes_the_fonts_and_colours_of_the_page():
    svg = latency_quality(compare(deployed_english().outcome()))
    assert svg is not None
    assert "font-family" not in svg
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "#040506" not in svg
    assert not re.search(r"<image|<!ENTITY|<\?xml|<!DOCTYPE", svg)


def test_two_pictures_of_one_page_share_no_id():
    history = training_history(90, 3)
    pictures = [loss_curve(history, 60, 30), validation_curve(history, 60), latency_quality(compare(deployed_english().outcome()))]
    ids = [found for svg in pictures for found in re.findall(r' id="([^"]+)"', svg or "")]
    assert ids
    assert len(ids) == len(set(ids))


def test_the_latency_picture_in_words_holds_the_numbers():
    words = describe_latency_quality(compare(deployed_english().outcome()))
    assert "dynamic_int8: 4.7 ms, 82.8" in words or "dynamic_int8: 4.7 ms, 82.9" in words
