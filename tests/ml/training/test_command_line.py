import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ml.errors import ConfigError
from ml.training.command_line import main, read_spec
from ml.training.folders import WorkFolder
from ml.training.history import last_step, read_history
from ml.training.spec import Nodes, Optimizer, TrainSpec
from tests.ml.training.test_launcher import processes_of
from tests.ml.training.test_loop import toy_spec

NEEDED = {"job": "tests.ml.training.toy_job:ToyJob", "work_dir": "/nowhere"}
FROM_OUTSIDE = ("PET_NODE_RANK", "PET_NNODES", "PET_MASTER_ADDR", "PET_MASTER_PORT", "JOB_COMPLETION_INDEX")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FROM_OUTSIDE:
        monkeypatch.delenv(name, raising=False)


def write(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(values))
    return path


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ml.training", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, **environment})


def test_the_json_of_a_spec_comes_back(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path / "work", job={"dropout": 0.1}, num_ranks=4)
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert read_spec(tmp_path / "spec.json", {}) == (spec, None)


def test_fields_that_are_left_out_have_their_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, NEEDED | {"optimizer": {"momentum": 0.9}})
    spec, _ = read_spec(path, {"optimizer.learning_rate": 0.1, "num_ranks": 8, "job_arguments.noise": 0.5})
    assert spec == TrainSpec(
        job=NEEDED["job"],
        work_dir=Path("/nowhere"),
        num_ranks=8,
        optimizer=Optimizer(momentum=0.9, learning_rate=0.1),
        job_arguments={"noise": 0.5},
    )


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"epoch": 3}, {}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"optimizer": {"rate": 3}}, {}, "unknown setting 'optimizer.rate'"),
        ({"optimizer": 3}, {}, "optimizer is a section, found 3"),
        ({}, {"optimizer.momentun": 0.9}, "unknown setting 'optimizer.momentun'; did you mean 'momentum'"),
        ({}, {"nodes.adress": "x"}, "unknown setting 'nodes.adress'"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, changes: dict, overrides: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_spec(write(tmp_path, NEEDED | changes), overrides)


def test_a_missing_file_or_work_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothere\.json: there is no such file"):
        read_spec(tmp_path / "nothere.json", {})
    with pytest.raises(ConfigError, match="work_dir is missing"):
        read_spec(write(tmp_path, {"job": "a:B"}), {})
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_spec(tmp_path / "spec.json", {})


def test_the_place_comes_from_the_command_line_then_the_environment_then_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, NEEDED | {"nodes": {"count": 4, "rank": 3, "master_addr": "of-the-file", "master_port": 1}})
    assert read_spec(path, {})[0].nodes == Nodes(count=4, rank=3, master_addr="of-the-file", master_port=1)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert read_spec(path, {})[0].nodes.rank == 2
    for name, value in {"PET_NODE_RANK": "1", "PET_NNODES": "2:6", "PET_MASTER_ADDR": "of-the-operator", "PET_MASTER_PORT": "5"}.items():
        monkeypatch.setenv(name, value)
    assert read_spec(path, {})[0].nodes == Nodes(count=6, min_count=2, rank=1, master_addr="of-the-operator", master_port=5)
    assert read_spec(path, {"nodes.rank": 0, "nodes.master_addr": "mine"})[0].nodes.rank == 0
    assert read_spec(path, {"nodes.rank": 0, "nodes.master_addr": "mine"})[0].nodes.master_addr == "mine"


def test_the_index_of_independent_trainings_is_not_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert read_spec(write(tmp_path, NEEDED), {})[0].nodes == Nodes()


def test_a_dry_run_shows_spec_and_command_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = toy_spec(tmp_path / "work", num_ranks=4)
    (tmp_path / "spec.json").write_text(spec.to_json())
    arguments = ["--spec", str(tmp_path / "spec.json"), "--dry-run", "--num-nodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]
    assert main([*arguments, "--set", "optimizer.learning_rate=1e-4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert TrainSpec.from_json(json.dumps(shown["spec"])) == replace(
        spec, nodes=Nodes(count=2, rank=1, master_addr="10.0.0.1"), optimizer=replace(spec.optimizer, learning_rate=1e-4)
    )
    assert shown["command"][:3] == [sys.executable, "-m", "ml.training.elastic"]
    assert shown["command"][shown["command"].index("--nproc-per-node") + 1] == "2"
    assert shown["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not (tmp_path / "work").exists()


def test_bad_input_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = str(write(tmp_path, NEEDED))
    for arguments in (
        ["--set", "nothing"],
        ["--set", "epoch=1"],
        ["--num-nodes", "2", "--node-rank", "2"],
        ["--num-ranks", "3", "--num-nodes", "2"],
    ):
        assert main(["--spec", path, *arguments]) == 2
        said = json.loads(capsys.readouterr().out)
        assert (said["status"], said["error"]) == ("failed", "ConfigError"), arguments


def test_an_error_in_a_rank_is_exit_code_1(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path / "work", job={"fault": {"do": "raise", "batch": 8, "rank": 0}})
    (tmp_path / "spec.json").write_text(spec.to_json())
    result = call("--spec", str(tmp_path / "spec.json"))
    assert result.returncode == 1
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["status"] == "failed" and "ValueError: the toy broke" in said["message"]
    assert processes_of(tmp_path / "work") == []


def test_figures_are_served_while_it_trains(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path / "reviews", job={"step_seconds": 0.1})
    (tmp_path / "spec.json").write_text(spec.to_json())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        refused = call("--spec", str(tmp_path / "spec.json"), "--metrics-port", str(port))
        assert refused.returncode == 2
        assert f"--metrics-port {port}: Address already in use" in json.loads(refused.stdout.splitlines()[-1])["message"]
    arguments = ["--spec", str(tmp_path / "spec.json"), "--metrics-port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "ml.training", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as training:
        found = ""
        while training.poll() is None and 'millstream_training_step{training="reviews"}' not in found:
            with contextlib.suppress(httpx.HTTPError):
                found = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            time.sleep(0.05)
        _, err = training.communicate(timeout=200)
    assert training.returncode == 0, err.decode()
    assert float(re.findall(r'millstream_training_step{training="reviews"} (\S+)', found)[0]) >= 1


def test_started_by_torchrun_it_is_a_rank_itself(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path / "work", num_ranks=2)
    (tmp_path / "spec.json").write_text(spec.to_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    result = subprocess.run(
        [*torchrun, "-m", "ml.training", "--spec", str(tmp_path / "spec.json")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["status"] == "done"
    assert last_step(read_history(WorkFolder(tmp_path / "work").history)) == outcome["num_steps"]
    assert processes_of(tmp_path / "work") == []


def test_reading_a_spec_needs_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(toy_spec(tmp_path / "work").to_json())
    code = (
        "import sys\n"
        "from ml.training.command_line import main\n"
        f"assert main(['--spec', {str(tmp_path / 'spec.json')!r}, '--dry-run']) == 0\n"
        "print([name for name in ('torch', 'pydantic', 'yaml', 'pandas') if name in sys.modules], file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip().endswith("[]")
