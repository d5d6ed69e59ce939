"""A person's way through the Prefect UI, in Chromium: the form, what it refuses, a run, and what its page tells.

MILLSTREAM_SCREENSHOTS names a folder for pictures of each step.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from tests.e2e.conftest import QUICK_SETTINGS, Workspace, write_reviews
from tests.ml.report.browser import Chromium, find_chromium, open_chromium

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

RUN_SECONDS = 900  # a minute and a half on a machine with nothing else to do
# Never stopped early, so that the bar of the training reaches its end.
SETTINGS = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in (*QUICK_SETTINGS, "train.patience=1000"))}
REFUSAL = "Error creating flow run: Validation failed for field"


class PrefectUI:
    """The UI and the API of one server."""

    def __init__(self, browser: Chromium, url: str):
        self.browser = browser
        self.url = url

    def api(self, path: str, body: object = None) -> Any:
        answer = httpx.request("GET" if body is None else "POST", f"{self.url}/api{path}", json=body, timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    @property
    def deployment_id(self) -> str:
        return self.api("/deployments/name/training-pipeline/sentiment")["id"]

    def runs(self) -> list[dict[str, Any]]:
        """Those that no schedule has planned, the newest first."""
        return [run for run in self.api("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"}) if not run["auto_scheduled"]]

    def wait_for_end(self, run_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + RUN_SECONDS
        while (run := self.api(f"/flow_runs/{run_id}"))["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            assert time.monotonic() < deadline, f"the run is still {run['state_name']} after {RUN_SECONDS} s"
            time.sleep(1)
        return run

    def task_names(self, run_id: str) -> list[str]:
        return [task["name"] for task in self.api("/task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run_id]}}})]

    def open_form(self) -> None:
        self.browser.open(f"{self.url}/deployments/deployment/{self.deployment_id}/run", height=1900)
        self.see("Other settings")
        # The form comes empty, and is filled with the deployment's own parameters a moment later, over whatever was typed.
        self.browser.wait_until(f"{_field('Model name')}.querySelector('.p-base-input__control')?.value == 'sentiment'")
        time.sleep(1)

    def fill(self, field: str, text: str) -> None:
        control = f"{_field(field)}.querySelector('.p-label__body .p-base-input__control')"
        for _ in range(10):
            self.browser.type_into(control, text)
            time.sleep(1)
            # The form may have been filled with the deployment's parameters once more, over what was typed.
            if text in (self.browser.evaluate(f"{control}.value ?? {control}.innerText") or ""):
                return
        raise AssertionError(f"{field} does not keep {text!r}")

    def see(self, *words: str) -> None:
        """Wait until the page says all of this."""
        for each in words:
            self.browser.wait_until(f"document.body.innerText.includes({json.dumps(each)})")

    def submit(self) -> None:
        self.browser.click(_button("Submit"))

    def outside_addresses(self) -> list[str]:
        """What the page asked of anyone but this server."""
        here = urlsplit(self.url).netloc
        return [url for url in self.browser.requests if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != here]


def _field(title: str) -> str:
    """The innermost element of the form that has this title."""
    fields = "[...document.querySelectorAll('.schema-form-property')]"
    return f"{fields}.findLast(e => e.querySelector('.schema-form-property__label')?.innerText.startsWith('{title}'))"


def _button(words: str) -> str:
    return f"[...document.querySelectorAll('button, a, .p-tab')].findLast(e => e.innerText.trim() == '{words}')"


@pytest.fixture(scope="module")
def ui(workspace: Workspace) -> Iterator[PrefectUI]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine")
    port = json.loads((workspace.state_dir / "ports.json").read_bytes())["prefect-server"]
    with open_chromium(executable) as browser:
        yield PrefectUI(browser, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def take_picture(ui: PrefectUI) -> Callable[[str], None]:
    folder = os.environ.get("MILLSTREAM_SCREENSHOTS")
    if folder is None:
        return lambda name: None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return lambda name: ui.browser.screenshot(Path(folder) / f"{name}.png")


@pytest.mark.parametrize("path", ["/", "/v2/dashboard"])
def test_the_start_page_asks_nobody_outside(path: str, ui: PrefectUI):
    ui.browser.open(ui.url + path)
    ui.see("Dashboard", "Deployments")
    time.sleep(3)  # what a page sends once it has settled down
    assert ui.outside_addresses() == []


def test_the_form_describes_every_field_and_offers_what_there_is(ui: PrefectUI, take_picture: Callable[[str], None]):
    ui.open_form()
    take_picture("form")
    titles = ui.browser.evaluate("[...document.querySelectorAll('.schema-form-property__label')].map(e => e.innerText)")
    assert [title.removesuffix(" (Optional)") for title in titles] == [
        "request", "Solution", "Profile", "Data", "Text Column", "Label Column", "Encoding", "Model name", "Encoder",
        "Budget in minutes", "Seed", "Other settings", "Cause",
    ]  # fmt: skip
    assert ui.browser.evaluate("document.querySelectorAll('.schema-form-property__description').length") == len(titles)
    options = f"[...{_field('Profile')}.querySelectorAll('option')].map(e => e.value)"
    assert ui.browser.evaluate(options) == ["quick", "full"]
    assert ui.browser.evaluate(f"{_field('Profile')}.querySelector('select').value") == "quick"
    for words in ("more than 0 and at most 10080", "leave this empty", "lower case letters, digits"):
        assert words in ui.browser.text
    assert ui.outside_addresses() == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("Budget in minutes", "-5", "'request.budget_minutes'. Failure reason: -5 is less than or equal to the minimum of 0"),
        ("Seed", "-1", "'request.seed'. Failure reason: -1 is less than the minimum of 0"),
        ("Model name", "Not A Name", "'request.name'. Failure reason: 'Not A Name' does not match"),
        ("Other settings", '{"train.epochz": 3}', "'train.epochz' was unexpected"),
        ("Other settings", '{"train.patience": 0}', "0 is less than the minimum of 1"),
    ],
)
def test_a_wrong_value_is_refused_and_makes_no_run(field: str, value: str, said: str, ui: PrefectUI, take_picture: Callable[[str], None]):
    before = ui.runs()
    ui.open_form()
    ui.fill(field, value)
    ui.submit()
    ui.see(REFUSAL)
    take_picture(f"refused {field}")
    assert said in ui.browser.text
    assert [run["id"] for run in ui.runs()] == [run["id"] for run in before]


def test_what_no_schema_can_say_is_refused_before_any_task(ui: PrefectUI):
    request = {"overrides": {"compression": ["no_such_method"]}}
    run = ui.api(f"/deployments/{ui.deployment_id}/create_flow_run", {"parameters": {"request": request}})
    run = ui.wait_for_end(run["id"])
    assert run["state_type"] == "FAILED"
    assert "there is no method 'no_such_method'; known: " in run["state"]["message"]
    assert ui.task_names(run["id"]) == []


def test_a_run_from_the_form_tells_its_story(
    workspace: Workspace, ui: PrefectUI, tmp_path: Path, take_picture: Callable[[str], None], record_property: Callable[[str, object], None]
):
    ui.open_form()
    fields = {
        "Data": write_reviews(tmp_path / "reviews.csv", 300),
        "Text Column": "review",
        "Label Column": "stars",
        "Model name": "reviews-by-form",
        "Encoder": workspace.encoder,
        "Other settings": json.dumps(SETTINGS),
    }
    for field, value in fields.items():
        ui.fill(field, str(value))
    take_picture("form filled in")
    before = {run["id"] for run in ui.runs()}
    ui.submit()
    submitted = time.time()
    # The UI leads to the deployment, where the run is the next one.
    ui.browser.wait_until("!location.pathname.endsWith('/run')")
    run_id = next(run["id"] for run in ui.runs() if run["id"] not in before)
    run = ui.wait_for_end(run_id)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    _record_start(run, submitted, record_property)

    ui.browser.open(f"{ui.url}/runs/flow-run/{run_id}", height=1400)
    ui.see(run["name"], "Completed", "training-pipeline", "Task Runs")
    assert {"train_model", "deploy_model", "compress_model: dynamic_int8"} <= set(ui.task_names(run_id))
    assert run["name"] == "sentiment/reviews-by-form · quick · by hand"
    ui.browser.click(_button("Artifacts"))
    ui.see("reviews-by-form-before-after", "reviews-by-form-training-curve", "reviews-by-form-report")
    time.sleep(1)  # the timeline is drawn
    take_picture("run")
    assert ui.outside_addresses() == []

    artifacts = {item["key"]: item for item in ui.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})}
    assert {"training", "compression", "scoring-on-validation", "scoring-on-test"} <= set(artifacts)
    assert {item["data"] for item in artifacts.values() if item["type"] == "progress"} == {100}
    outcome = workspace.outcome()
    _table_is_shown(ui, artifacts["reviews-by-form-before-after"]["id"], outcome)
    take_picture("table")
    _pictures_are_shown(ui, artifacts["reviews-by-form-training-curve"]["id"], 2)
    take_picture("curve")
    _pictures_are_shown(ui, artifacts["reviews-by-form-report"]["id"], 3)
    take_picture("report")
    ui.see("reviews-by-form: deployed", "Started by hand", outcome["reasons"][0], outcome["addresses"]["report_path"])
    assert ui.outside_addresses() == []


def _record_start(run: dict[str, Any], submitted: float, record_property: Callable[[str, object], None]) -> None:
    started = datetime.fromisoformat(run["start_time"]).timestamp()
    record_property("seconds_from_form_to_run", round(started - submitted, 1))
    print(f"from the click on Submit to the run's start: {started - submitted:.1f} s")


def _table_is_shown(ui: PrefectUI, artifact_id: str, outcome: dict[str, Any]) -> None:
    ui.browser.open(f"{ui.url}/artifacts/artifact/{artifact_id}", height=1000)
    ui.browser.wait_until("document.querySelectorAll('table tbody tr').length")
    rows = ui.browser.evaluate("[...document.querySelectorAll('table tbody tr')].map(row => row.cells[0].innerText.trim())")
    assert rows == [("▶ " if model["chosen"] else "") + model["name"] for model in outcome["models"]]


def _pictures_are_shown(ui: PrefectUI, artifact_id: str, number: int) -> None:
    ui.browser.open(f"{ui.url}/artifacts/artifact/{artifact_id}", height=1000)
    drawn = "[...document.querySelectorAll('article img')].filter(e => e.src.startsWith('data:image/') && e.naturalWidth > 0).length"
    ui.browser.wait_until(f"({drawn}) == {number}")
