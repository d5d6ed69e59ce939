import base64

import pytest

from ml.monitoring.histograms import MAX_BINS, share_histogram, value_histogram
from ml.monitoring.pictures import describe_histograms, histograms_picture


def test_bins_cover_both_samples_and_name_whole_numbers():
    found = value_histogram("words", list(range(1, 121)), [5] * 50 + [500] * 50)
    assert (found.bins[0], found.bins[1], found.bins[-1]) == ("< 11", "11-20", "≥ 110")
    assert len(found.bins) == MAX_BINS
    assert sum(found.reference) == pytest.approx(1)
    assert (found.current[0], found.current[-1]) == (0.5, 0.5)


def test_one_length_only_still_makes_bins():
    found = value_histogram("words", [3] * 10, [3] * 5 + [2] * 5)
    assert (found.bins, found.reference, found.current) == (("< 3", "≥ 3"), (0.0, 1.0), (0.5, 0.5))


def test_the_most_frequent_classes_are_shown():
    found = share_histogram("classes", ["a"] * 3 + ["b"], ["b"] * 2)
    assert (found.bins, found.reference, found.current) == (("a", "b"), (0.75, 0.25), (0.0, 1.0))
    assert len(share_histogram("classes", [f"{number}" for number in range(50)], ["1"]).bins) == MAX_BINS


def test_names_in_any_script_stay_text_in_the_picture():
    histogram = share_histogram("类别 <b> $x$", ["好评", "差评"], ["好评"])
    picture = histograms_picture([histogram])
    assert picture is not None
    svg = base64.b64decode(picture.partition(",")[2]).decode()
    assert "好评" in svg
    assert "&lt;b&gt; $x$" in svg
    assert "<image" not in svg
    assert describe_histograms([histogram]) == "类别 <b> $x$, largest difference at 好评: 50% before, 100% now"
    assert histograms_picture([]) is None
