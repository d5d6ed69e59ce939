"""docs/troubleshooting.md against the code: its findings, links, settings and messages are real ones."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from ml.train_config import TrainConfig
from ml.training.findings import NAMES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ADVICE = "\n".join((ROOT / "ml" / "training" / name).read_text(encoding="utf-8") for name in ("diagnosis.py", "loss_diagnosis.py"))
HEADINGS = re.findall(r"^#{2,3} (.+)$", PAGE, re.MULTILINE)
MESSAGES = re.findall(r"^> (.+)$", PAGE, re.MULTILINE)
SETTINGS = sorted(set(re.findall(r"\btrain\.([a-z_]+(?:\.[a-z_]+)?)", PAGE + ADVICE)))


def test_every_finding_has_a_section():
    assert set(NAMES) <= set(HEADINGS)


def test_links_lead_somewhere():
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert set(links) <= anchors
    assert anchors <= set(links)  # the table of contents is whole


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_there(setting: str):
    section: type[BaseModel] = TrainConfig
    *parents, name = setting.split(".")
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    assert name in section.model_fields


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str):
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "ml" / "training").rglob("*.py")))
    # Strings over several lines, and what is put into them, taken out.
    joined = re.sub(r"\"\s*\n\s*f?\"", "", sources)
    joined = re.sub(r"\{(gradient_sync|sync|nodes)?[^{}\n]*\}", "…", joined)
    pieces = [piece.strip(" ;") for piece in message.split("…")]
    assert all(piece in joined for piece in pieces), message
