import json
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ml.training.findings import INPUT_BOUND, NAMES
from ml.training.meters import metrics_file
from ml.training_metrics import OF_A_RANK, serve, write_textfile
from tests.ml.training.metric_lines import healthy_ranks, learning_curve, loss_lines, meter_lines, validation_lines


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, rank or name of the finding) -> value."""
    return {
        (sample.name, *(value for label, value in sample.labels.items() if label != "training")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_text_file_holds_the_last_line_of_each_rank(tmp_path: Path):
    random = np.random.default_rng(0)
    history = loss_lines(learning_curve(random, 300), num_steps=900) + validation_lines([0.6, 0.5], every=150)
    metrics = healthy_ranks(random)
    metrics[1] = meter_lines(random, 1, data_wait_share=0.5)
    path = tmp_path / "collector" / "training.prom"
    write_textfile(path, "reviews", history, metrics)
    assert [file.name for file in path.parent.iterdir()] == ["training.prom"]
    found = samples(path.read_text())
    assert found["millstream_training_step",] == 300
    assert found["millstream_training_steps_planned",] == 900
    assert found["millstream_training_validation_loss",] == 0.5
    for rank in (0, 1):
        for name in OF_A_RANK:
            value = metrics[rank][-1][name]
            assert found.get((f"millstream_training_{name}", str(rank))) == (None if value is None else pytest.approx(value))
    assert {name: found["millstream_training_finding", name] for name in NAMES} == {name: float(name == INPUT_BOUND) for name in NAMES}
    assert 'training="reviews"' in path.read_text()


def test_before_the_first_step_there_are_no_figures_but_findings(tmp_path: Path):
    write_textfile(tmp_path / "t.prom", "reviews", [], {})
    assert {name for name, *_ in samples((tmp_path / "t.prom").read_text())} == {"millstream_training_finding"}


def test_the_exporter_reads_anew_and_ends(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    random = np.random.default_rng(0)
    history_path, metrics_dir = tmp_path / "history.jsonl", tmp_path / "metrics"
    stop = serve(port, "reviews", history_path, metrics_dir)
    try:
        address = f"http://127.0.0.1:{port}/metrics"
        assert "rank=" not in httpx.get(address, trust_env=False).text
        metrics_dir.mkdir()
        for rank, lines in healthy_ranks(random).items():
            metrics_file(metrics_dir, rank).write_text("".join(json.dumps(line) + "\n" for line in lines))
        history_path.write_text("".join(json.dumps(line) + "\n" for line in loss_lines(learning_curve(random, 30))))
        found = samples(httpx.get(address, trust_env=False).text)
        assert found["millstream_training_step",] == 30
        assert ("millstream_training_step_seconds", "1") in found
        with pytest.raises(OSError):
            serve(port, "other", history_path, metrics_dir)
    finally:
        stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(address, trust_env=False)
