import json
from pathlib import Path

from ml.training.history import HistoryTail, HistoryWriter, last_step, read_history, rewind


def write_steps(path: Path, first: int, last: int) -> None:
    with HistoryWriter(path) as history:
        for step in range(first, last + 1):
            history.write("step", step=step, loss=1 / step)


def test_rewinding_cuts_later_steps_and_keeps_events(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_steps(path, 1, 5)
    with HistoryWriter(path) as history:
        history.event("something happened")
    write_steps(path, 6, 7)
    assert rewind(path, 4, None) == 3
    records = read_history(path)
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4]
    assert [record["message"] for record in records if record["kind"] == "event"] == ["something happened"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_steps(path, 1, 3)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert last_step(read_history(path)) == 3
    assert rewind(path, 3, None) == 0
    assert path.read_text().endswith("}\n")


def test_on_another_machine_the_history_comes_from_the_checkpoint(tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint.jsonl"
    write_steps(kept, 1, 4)
    assert rewind(tmp_path / "history.jsonl", 4, kept) == 0
    assert last_step(read_history(tmp_path / "history.jsonl")) == 4


def test_rewinding_nothing_gives_an_empty_history(tmp_path: Path) -> None:
    assert rewind(tmp_path / "history.jsonl", 0, None) == 0
    assert read_history(tmp_path / "history.jsonl") == []


def test_tail_reports_each_whole_line_once(tmp_path: Path) -> None:
    path, seen = tmp_path / "history.jsonl", []
    write_steps(path, 1, 2)
    tail = HistoryTail(path, seen.append)
    write_steps(path, 3, 4)
    with path.open("a") as file:
        file.write('{"kind": "step", ')
    tail.poll()
    assert [record["step"] for record in seen] == [3, 4]
    with path.open("a") as file:
        file.write('"step": 5}\n')
    tail.poll()
    tail.poll()
    assert [record["step"] for record in seen] == [3, 4, 5]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "h.jsonl") as history:
        history.write("validation", step=1, accuracy=None)
    assert json.loads((tmp_path / "h.jsonl").read_text()) == {"kind": "validation", "step": 1, "accuracy": None}
