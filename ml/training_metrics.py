"""A training in Prometheus: gauges of the last line of each rank and of the history, as a text file or over HTTP.

    millstream_training_step                              finished steps
    millstream_training_steps_planned
    millstream_training_loss                              of the last step
    millstream_training_learning_rate
    millstream_training_validation_loss, _accuracy, _recall    of the last validation
    millstream_training_finding{name}                     1 for each finding there is now (ml.training.findings), else 0
    millstream_training_<figure>{rank}                    of each rank's last line (ml.training.meters):
        step_seconds, data_seconds, forward_seconds, backward_seconds, update_seconds, data_wait_share, communication_share,
        outside_steps_share, rows_per_second, tokens_per_second, mfu, cpu_percent, rss_bytes, pss_bytes, node_memory_share,
        gpu_percent, gpu_memory_bytes, gpu_memory_peak_bytes
    millstream_training_last_line_seconds{rank}           when that line was written, seconds since 1970: alert on its age

Every series has the label `training`. What is not known has no series.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ml.training.diagnosis import diagnose, recent_lines
from ml.training.findings import NAMES
from ml.training.history import read_history
from ml.training.meters import read_metrics

PREFIX = "millstream_training_"
OF_A_RANK = {
    "step_seconds": "mean time of a step",
    "data_seconds": "mean wait for a batch",
    "forward_seconds": "mean time of the forward pass",
    "backward_seconds": "mean time of the backward pass, communication that it does not hide included",
    "update_seconds": "mean time of clipping and the optimizer",
    "data_wait_share": "share of a step spent waiting for data, 0 to 1",
    "communication_share": "share of a step spent waiting for other ranks or the network, 0 to 1",
    "outside_steps_share": "share of the wall time outside of steps, 0 to 1",
    "rows_per_second": "rows of this rank",
    "tokens_per_second": "tokens of this rank",
    "mfu": "model FLOPs utilisation, 0 to 1",
    "cpu_percent": "CPU of the process; 100 is one core",
    "rss_bytes": "memory of the process, shared pages in full",
    "pss_bytes": "memory of the process, shared pages divided by those who share them",
    "node_memory_share": "memory in use of what may be used on the machine, 0 to 1",
    "gpu_percent": "share of the time in which the GPU ran anything, 0 to 100",
    "gpu_memory_bytes": "memory in use on the GPU",
    "gpu_memory_peak_bytes": "the most that tensors took on the GPU",
}
_OF_THE_HISTORY = {
    "step": ("step", "step", "finished steps"),
    "loss": ("step", "loss", "loss of the last step"),
    "learning_rate": ("step", "learning_rate", "learning rate of the last step"),
    "validation_loss": ("validation", "loss", "loss of the last validation"),
    "validation_accuracy": ("validation", "accuracy", "accuracy of the last validation, 0 to 1"),
    "validation_recall": ("validation", "recall", "macro recall of the last validation, 0 to 1"),
}

Line = dict[str, Any]


class TrainingCollector(Collector):
    """Reads the figures anew for every scrape.

    Args:
        training: names it among others, as the label `training`.
        read: history and meter lines as they are now.
    """

    def __init__(self, training: str, read: Callable[[], tuple[Sequence[Line], dict[int, list[Line]]]]):
        self._training = training
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        history, metrics = self._read()
        yield from self._of_the_history(history)
        found = {finding.name for finding in diagnose(history, metrics)}
        findings = GaugeMetricFamily(PREFIX + "finding", "1 where the diagnosis finds it now", labels=["training", "name"])
        for name in NAMES:
            findings.add_metric([self._training, name], float(name in found))
        yield findings
        yield from self._of_ranks({rank: lines[-1] for rank, lines in recent_lines(metrics).items()})

    def _of_the_history(self, history: Sequence[Line]) -> Iterator[GaugeMetricFamily]:
        planned = next((line["num_steps"] for line in reversed(history) if line.get("num_steps")), None)
        values = {"steps_planned": (planned, "steps planned; early stopping may end the training before")}
        for figure, (kind, name, words) in _OF_THE_HISTORY.items():
            last = next((line for line in reversed(history) if line.get("kind") == kind), {})
            values[figure] = (last.get(name), words)
        for figure, (value, words) in values.items():
            if value is not None:
                gauge = GaugeMetricFamily(PREFIX + figure, words, labels=["training"])
                gauge.add_metric([self._training], float(value))
                yield gauge

    def _of_ranks(self, latest: dict[int, Line]) -> Iterator[GaugeMetricFamily]:
        figures = {name: (name, words) for name, words in OF_A_RANK.items()}
        figures["last_line_seconds"] = ("time", "when the figures of this rank were written, seconds since 1970")
        for figure, (name, words) in figures.items():
            gauge = GaugeMetricFamily(PREFIX + figure, words, labels=["training", "rank"])
            for rank, line in latest.items():
                if line.get(name) is not None:
                    gauge.add_metric([self._training, str(rank)], float(line[name]))
            if gauge.samples:
                yield gauge


def write_textfile(path: Path, training: str, history: Sequence[Line], metrics: dict[int, list[Line]]) -> None:
    """Write what is now for node_exporter's textfile collector: `path` ends in .prom and lies in its folder.

    A reader sees the old file or the new one. Delete the file when the training is over: its figures would stay for ever.
    """
    registry = CollectorRegistry()
    registry.register(TrainingCollector(training, lambda: (history, metrics)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), registry)


def serve(port: int, training: str, history_path: Path, metrics_dir: Path) -> Callable[[], None]:
    """Answer scrapes at http://127.0.0.1:<port>/metrics, on the loopback interface only, until the function that is returned is called.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(TrainingCollector(training, lambda: (read_history(history_path), read_metrics(metrics_dir))))
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
