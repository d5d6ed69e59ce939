import json
from pathlib import Path

from ml.training.history import HistoryTail, HistoryWriter, last_step, read_history, restore_history, resume_history, resumptions


def write_steps(path: Path, first: int, last: int) -> None:
    with HistoryWriter(path) as history:
        for step in range(first, last + 1):
            history.write("step", step=step, loss=1 / step)


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_history(path) if record["kind"] == "step"]


def test_resuming_voids_later_steps_and_validations_and_keeps_events(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_steps(path, 1, 5)
    with HistoryWriter(path) as history:
        history.write("validation", step=4, loss=0.5)
        history.write("validation", step=5, loss=0.4)
        history.event("something happened")
    write_steps(path, 6, 7)
    before = path.read_bytes()
    assert resume_history(path, 4, None) == 3
    assert path.read_bytes().startswith(before)  # nothing is ever taken out of the file
    write_steps(path, 5, 6)
    records = read_history(path)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if record["kind"] == "validation"] == [4]
    assert [record["message"] for record in records if record["kind"] == "event"] == ["something happened"]


def test_losses_of_all_interruptions_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_steps(path, 1, 7)
    assert resume_history(path, 0, None) == 7
    write_steps(path, 1, 12)
    assert resume_history(path, 10, None) == 2
    write_steps(path, 11, 11)
    assert resume_history(path, 10, None) == 1
    write_steps(path, 11, 13)
    assert steps(path) == list(range(1, 14))
    assert resumptions(read_history(path)) == (10, 10)


def test_a_line_that_a_kill_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_steps(path, 1, 3)
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert last_step(read_history(path)) == 3
    assert resume_history(path, 3, None) == 0
    write_steps(path, 4, 4)
    assert steps(path) == [1, 2, 3, 4]
    assert resumptions(read_history(path)) == (3, 0)


def test_on_another_machine_the_history_comes_from_the_checkpoint(tmp_path: Path) -> None:
    kept, live = tmp_path / "checkpoint.jsonl", tmp_path / "history.jsonl"
    write_steps(kept, 1, 4)
    assert resume_history(live, 4, kept) == 0
    assert steps(live) == [1, 2, 3, 4]
    assert resumptions(read_history(live)) == (4, 0)


def test_a_history_that_reaches_the_checkpoint_is_kept(tmp_path: Path) -> None:
    kept, live = tmp_path / "checkpoint.jsonl", tmp_path / "history.jsonl"
    write_steps(kept, 1, 4)
    write_steps(live, 1, 6)
    restore_history(live, 4, kept)
    assert steps(live) == [1, 2, 3, 4, 5, 6]


def test_a_first_start_writes_nothing(tmp_path: Path) -> None:
    assert resume_history(tmp_path / "history.jsonl", 0, None) == 0
    assert read_history(tmp_path / "history.jsonl") == []
    assert not (tmp_path / "history.jsonl").exists()
    assert resumptions([]) == (0, 0)


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


def test_tail_passes_over_what_a_kill_cut_off(tmp_path: Path) -> None:
    path, seen = tmp_path / "history.jsonl", []
    write_steps(path, 1, 2)
    with path.open("a") as file:
        file.write('{"kind": "st')
    tail = HistoryTail(path, seen.append)
    resume_history(path, 1, None)
    write_steps(path, 2, 2)
    tail.poll()
    assert [record["kind"] for record in seen] == ["resumed", "step"]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "h.jsonl") as history:
        history.write("validation", step=1, accuracy=None)
    assert json.loads((tmp_path / "h.jsonl").read_text()) == {"kind": "validation", "step": 1, "accuracy": None}
