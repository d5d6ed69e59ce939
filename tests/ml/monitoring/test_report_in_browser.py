"""The page of a check as Chromium shows it: it fits a phone, draws its picture, and asks for nothing."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ml.monitoring.check import run_check
from ml.monitoring.config import DriftRequest
from ml.monitoring.report import render_check
from tests.ml.monitoring.champions import make_champion
from tests.ml.monitoring.text_sources import TextSource
from tests.ml.report.browser import find_chromium, open_chromium

pytestmark = pytest.mark.browser

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
FACTS = {
    "page_width": "document.documentElement.scrollWidth",
    "view_width": "document.documentElement.clientWidth",
    "pictures": "[...document.images].map(e => e.complete && e.naturalWidth > 0 && e.getBoundingClientRect().height > 100)",
}


def test_the_page_fits_and_asks_for_nothing(artifact_store, tmp_path: Path):
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine")
    champion = make_champion(artifact_store, TextSource(1).draw(600))
    champion.answer(TextSource(2, median_length=30).draw(300), NOW)
    page = tmp_path / "check.html"
    page.write_text(render_check(run_check(artifact_store, DriftRequest(name="reviews"), now=NOW)), encoding="utf-8")
    with open_chromium(executable) as chromium:
        for width in (375, 1280):
            visit = chromium.visit(page, width=width, dark=width == 375, facts=FACTS)
            assert visit.facts["page_width"] == visit.facts["view_width"] == width
            assert visit.facts["pictures"] == [True]
            assert [url for url in visit.requests if not url.startswith("data:")] == [page.as_uri()]
            assert visit.messages == []
