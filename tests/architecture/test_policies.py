"""Rules of the house that a linter does not know."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("cli", "flows", "ml", "services", "solutions", "tasks") for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 450


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unpickles(path: Path) -> None:
    assert not re.search(r"pickle\.load|joblib\.load|torch\.load\(|torch\.save\(|allow_pickle=True|weights_only=False", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_keys_are_built_in_one_module(path: Path) -> None:
    if relative(path) != "ml/storage/keys.py":
        assert not re.search(r"""f?["'](artifacts/sha256|stages/|checkpoints/\{|registry/)""", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_say_what_is_inside(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "common", "misc", "manager"}


@pytest.mark.parametrize("path", sorted((ROOT / "flows").rglob("*.py")), ids=relative)
def test_flows_hold_no_data_libraries(path: Path) -> None:
    assert not re.search(r"^\s*(import|from) (pandas|torch|numpy|sklearn)\b", path.read_text(), re.MULTILINE)


def test_lock_pins_every_package_with_a_hash() -> None:
    for name in ("requirements.lock", "requirements-dev.lock", "requirements-demo.lock"):
        pinned = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith((" ", "#"))]
        assert pinned
        assert all(re.fullmatch(r"[a-z0-9._-]+(\[[a-z,]+\])?==[^ ]+ \\", line) for line in pinned), name


def test_lock_keeps_the_versions_that_work_together() -> None:
    """Newer ones break Prefect in ways that no installer sees: no flow starts, schedules never fire."""
    versions = dict(re.findall(r"^([a-z0-9._-]+)==([0-9.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert versions["prefect"] == "3.8.8"
    assert (0, 139) <= tuple(map(int, versions["fastapi"].split(".")[:2])) < (0, 151)
    assert tuple(map(int, versions["sqlalchemy"].split(".")[:2])) == (2, 0)
