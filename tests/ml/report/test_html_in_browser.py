"""The report as Chromium shows it: no sideways scrolling, no request, readable in light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ml.report.html import render_report
from tests.ml.report.browser import Chromium, find_chromium, open_chromium
from tests.ml.report.example_runs import ALL_RUNS, CHINESE

pytestmark = pytest.mark.browser

FACTS = {
    "page_width": "document.documentElement.scrollWidth",
    "window_width": "innerWidth",
    "view_width": "document.documentElement.clientWidth",
    "scripts": "document.scripts.length",
    "pictures": "document.querySelectorAll('figure[role=img][aria-label] svg').length",
    "drawn_pictures": "[...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().height > 100).length",
    "text": "document.body.innerText",
    "smallest_picture_text": "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))",
    # Elements that stick out of the view although no scrolling box around them hides it.
    "sticking_out": """[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('.scroll') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 80))""",
    "colours": "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].join(' on ')",
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with open_chromium(executable) as browser:
        yield browser


def write_report(run: str, folder: Path) -> Path:
    example = ALL_RUNS[run]()
    page = folder / "report.html"
    page.write_text(
        render_report(example.outcome(), example.history, example.summary, example.confusions, example.labels), encoding="utf-8"
    )
    return page


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("run", ALL_RUNS)
def test_the_page_fits_and_asks_for_nothing(run: str, width: int, chromium: Chromium, tmp_path: Path):
    page = write_report(run, tmp_path)
    visit = chromium.visit(page, width=width, dark=False, facts=FACTS)
    assert visit.facts["window_width"] == width
    assert visit.facts["page_width"] == visit.facts["view_width"]
    assert visit.facts["sticking_out"] == []
    assert visit.requests == [page.as_uri()]
    assert visit.messages == []
    assert visit.facts["scripts"] == 0


def test_pictures_are_drawn_and_their_text_is_readable_on_a_phone(chromium: Chromium, tmp_path: Path):
    visit = chromium.visit(write_report("deployed_english", tmp_path), width=375, dark=False, facts=FACTS)
    assert visit.facts["pictures"] == visit.facts["drawn_pictures"] == 3
    assert visit.facts["smallest_picture_text"] >= 9


def test_labels_in_any_script_and_markup_are_text(chromium: Chromium, tmp_path: Path):
    visit = chromium.visit(write_report("deployed_chinese", tmp_path), width=1280, dark=False, facts=FACTS)
    for label in CHINESE:
        assert label in visit.facts["text"]
    assert "<script>alert('x')</script>" in visit.facts["text"]


def test_dark_and_light_are_both_there(chromium: Chromium, tmp_path: Path):
    page = write_report("deployed_english", tmp_path)
    light = chromium.visit(page, width=1280, dark=False, facts=FACTS).facts["colours"]
    dark = chromium.visit(page, width=1280, dark=True, facts=FACTS).facts["colours"]
    assert light == "rgb(251, 251, 250) on rgb(27, 31, 36)"
    assert dark == "rgb(20, 23, 27) on rgb(228, 231, 234)"
