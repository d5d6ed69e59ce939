import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ml.training.checkpoint import load_checkpoint
from ml.training.checkpoint_folders import (
    STATE_FILE,
    find_damage,
    newest_checkpoint,
    prune_checkpoints,
    step_of_checkpoint,
    verified_checkpoint,
)
from ml.training.folders import WorkFolder, write_json
from ml.training.ranks import RankGroup
from tests.ml.training.checkpoint_cases import save_step, work_folder, write_without_end


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    """Checkpoints of steps 1, 2 and 3."""
    work = work_folder(tmp_path)
    for step in (1, 2, 3):
        save_step(work, step, {"model/w": torch.full((100,), float(step))}, keep_last=3)
    return work


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "seen_at_once"),
    [("missing", True), ("cut off", True), ("no state", True), ("broken state", True), ("other bytes", False)],
)
def test_a_damaged_checkpoint_is_passed_over(work: WorkFolder, harm: str, seen_at_once: bool, caplog: pytest.LogCaptureFixture) -> None:
    newest = work.checkpoint(3)
    file = newest / "rank-00000.safetensors"
    match harm:
        case "missing":
            file.unlink()
        case "cut off":
            os.truncate(file, file.stat().st_size - 1)
        case "no state":
            (newest / STATE_FILE).unlink()
        case "broken state":
            (newest / STATE_FILE).write_text('{"files": ')
        case "other bytes":
            change_a_byte(file)
    named = STATE_FILE if "state" in harm else file.name
    assert (newest_checkpoint(work.checkpoints) == work.checkpoint(2)) == seen_at_once
    assert named in (find_damage(newest) or "")
    with caplog.at_level(logging.WARNING):
        assert verified_checkpoint(work.checkpoints) == work.checkpoint(2)
    assert f"{newest} is damaged ({named}" in caplog.text
    # Whoever looks quickly from now on, such as the ranks, finds the same.
    assert newest_checkpoint(work.checkpoints) == work.checkpoint(2)
    save_step(work, 3, {"model/w": torch.zeros(100)})
    assert sorted(path.name for path in work.checkpoints.iterdir()) == ["step-00000002", "step-00000003"]


def test_every_file_is_checked(work: WorkFolder) -> None:
    for path in work.checkpoint(2).iterdir():
        if path.name == STATE_FILE or not path.stat().st_size:
            continue
        change_a_byte(path)
        assert path.name in (find_damage(work.checkpoint(2)) or ""), path
        change_a_byte(path)
    assert find_damage(work.checkpoint(2)) is None


def test_none_is_left_when_all_are_damaged(work: WorkFolder, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        change_a_byte(work.checkpoint(step) / "rank-00000.safetensors")
    assert verified_checkpoint(work.checkpoints) is None
    assert step_of_checkpoint(None) == 0
    assert verified_checkpoint(tmp_path / "nothing") is newest_checkpoint(tmp_path / "nothing") is None


def test_the_last_ones_are_kept_and_what_a_kill_left_goes(work: WorkFolder) -> None:
    (work.checkpoints / ".writing-00000004").mkdir()
    (work.checkpoints / ".replaced-step-00000003").mkdir()
    prune_checkpoints(work.checkpoints, keep_last=1)
    assert [path.name for path in work.checkpoints.iterdir()] == ["step-00000003"]


def test_a_checkpoint_of_an_older_version_counts_as_whole(work: WorkFolder) -> None:
    """So that whoever reads it can say that it is of another version."""
    folder = work.checkpoint(4)
    write_json(folder / STATE_FILE, {"format_version": 1, "files": {"model.safetensors": 3}})
    (folder / "model.safetensors").write_bytes(b"xxx")
    assert newest_checkpoint(work.checkpoints) == verified_checkpoint(work.checkpoints) == folder


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    kill_while_writing(tmp_path, num_kills=5, seed=1)


@pytest.mark.soak
@pytest.mark.slow
def test_twenty_kills_while_writing_leave_the_one_before(tmp_path: Path) -> None:
    kill_while_writing(tmp_path, num_kills=20, seed=time.time_ns())


def kill_while_writing(folder: Path, num_kills: int, seed: int) -> None:
    """Kill -9 a process that does nothing but save, at random moments."""
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ml.training.checkpoint_cases"])
    num_mebibytes = 24
    num_cut = 0
    for number in range(num_kills):
        work = work_folder(folder / str(number))
        process = context.Process(target=write_without_end, args=(work.root, num_mebibytes))
        process.start()
        assert process.pid is not None
        while process.is_alive() and newest_checkpoint(work.checkpoints) is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        num_cut += any(work.checkpoints.glob(".writing-*/rank-*.safetensors"))
        newest = newest_checkpoint(work.checkpoints)
        assert newest is not None
        assert verified_checkpoint(work.checkpoints) == newest
        tensors = {f"model/{i}": torch.zeros(2**18) for i in range(num_mebibytes)} | {"model/count": torch.tensor(0)}
        load_checkpoint(newest, tensors, RankGroup(), work=work, seed=0)
        assert all(tensor.eq(step_of_checkpoint(newest)).all() for tensor in tensors.values())
        save_step(work, 1000, {"model/w": torch.zeros(1)}, keep_last=1)
        assert [path.name for path in work.checkpoints.iterdir()] == ["step-00001000"], "what was left half-written goes"
    assert num_cut > 0, "no kill came while a file was being written"
