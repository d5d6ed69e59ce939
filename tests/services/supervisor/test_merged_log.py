import json

from services.supervisor.merged_log import MergedLog


def merged_texts(folder):
    return [line.split(" | ", 1)[1] for line in (folder / "stack.log").read_text().splitlines()]


def test_lines_of_all_parts_come_with_their_name(tmp_path):
    (tmp_path / "worker.log").write_text("first\n\nhalf a li")
    (tmp_path / "predictor.log").write_text("ready\n")
    log = MergedLog(tmp_path)
    log.collect()
    lines = (tmp_path / "stack.log").read_text().splitlines()
    assert [line.split()[2:] for line in lines] == [["predictor", "|", "ready"], ["worker", "|", "first"]]
    with (tmp_path / "worker.log").open("a") as file:
        file.write("ne\n")
    log.collect()
    log.collect()
    assert merged_texts(tmp_path) == ["ready", "first", "half a line"]


def test_a_restart_leaves_nothing_out_and_repeats_nothing(tmp_path):
    (tmp_path / "worker.log").write_text("one\n")
    MergedLog(tmp_path).collect()
    with (tmp_path / "worker.log").open("a") as file:
        file.write("two\n")
    MergedLog(tmp_path).collect()
    assert merged_texts(tmp_path) == ["one", "two"]


def test_a_log_that_was_turned_over_is_read_from_its_start(tmp_path):
    (tmp_path / "worker.log").write_text("a long first line\n")
    log = MergedLog(tmp_path)
    log.collect()
    (tmp_path / "worker.log").write_text("new\n")
    log.collect()
    assert merged_texts(tmp_path) == ["a long first line", "new"]


def test_event_lines_become_readable_and_one_per_request_is_left_out(tmp_path):
    events = [{"time": "t", "event": "live", "name": "sentiment", "replaces": None}, {"event": "predict", "items": 1}]
    (tmp_path / "predictor-events.log").write_text("".join(json.dumps(event) + "\n" for event in events) + "not JSON\n")
    (tmp_path / "object-store.log").write_text("I1124 11:57:37.206433 client.go:310 registered\nE1124 11:57:38.206433 disk is full\n")
    MergedLog(tmp_path).collect()
    assert merged_texts(tmp_path) == ["E1124 11:57:38.206433 disk is full", "live name=sentiment", "not JSON"]
