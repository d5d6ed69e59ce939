"""A fresh serving process that measures itself: `python -m ml.evaluation.probe --bundle FOLDER --threads N`.

It loads a bundle as the predictor does, says so on stdout, then obeys one JSON object per line on stdin and answers each
with one on stdout, until stdin ends, be it because the process that asked has died:

    {"command": "predict", "requests": [...]}               -> {"replies": [...]}
    {"command": "time", "batches": [[...], ...], "calls": n} -> {"seconds": [...]}, one per call, batches used in turn
    {"command": "memory"}                                   -> {"pss_bytes": ..., "peak_rss_bytes": ...}

A command that fails is answered with {"error": ...}. Nothing is imported that serving does not need, because memory and
load time are measured here.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ml.predictor import Predictor

_STARTED = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a bundle and measure it; see the module's docstring.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cores", type=lambda text: {int(core) for core in text.split(",")}, help="cores to stay on, e.g. 0,1")
    arguments = parser.parse_args()
    if arguments.cores:
        # Before the first import that counts cores.
        os.sched_setaffinity(0, arguments.cores)
    answers = _claim_stdout()

    from ml.predictor import load_predictor

    predictor = load_predictor(arguments.bundle, num_threads=arguments.threads)
    _answer(answers, {"load_seconds": time.perf_counter() - _STARTED})
    for line in sys.stdin:
        try:
            result = _obey(predictor, json.loads(line))
        except Exception:
            result = {"error": traceback.format_exc()}
        _answer(answers, result)


def _claim_stdout() -> TextIO:
    """Keep stdout for answers: whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, result: dict) -> None:
    answers.write(json.dumps(result) + "\n")
    answers.flush()


def _obey(predictor: "Predictor", command: dict) -> dict:
    match command["command"]:
        case "predict":
            return {"replies": predictor.predict(command["requests"])}
        case "time":
            return {"seconds": _time_calls(predictor, command["batches"], command["calls"])}
        case "memory":
            return read_memory()
        case other:
            raise ValueError(f"unknown command {other!r}; known: predict, time, memory")


def _time_calls(predictor: "Predictor", batches: list[list[dict]], num_calls: int) -> list[float]:
    """Seconds of each call, from request to reply: encoding, graph and decoding."""
    gc.collect()
    seconds = []
    for call in range(num_calls):
        batch = batches[call % len(batches)]
        started = time.perf_counter()
        predictor.predict(batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def read_memory() -> dict[str, int]:
    """Memory of this process, in bytes.

    PSS shares pages that several processes map among them. The peak is VmHWM: ru_maxrss is no use here, because a
    process inherits it from the one that started it.
    """
    smaps = _read_kilobytes(Path("/proc/self/smaps_rollup"))
    return {"pss_bytes": smaps["Pss"], "peak_rss_bytes": _read_kilobytes(Path("/proc/self/status"))["VmHWM"]}


def _read_kilobytes(path: Path) -> dict[str, int]:
    """Lines such as `Pss:   1234 kB` -> bytes by name."""
    values = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB":
            values[name] = int(parts[0]) * 1024
    return values


if __name__ == "__main__":
    main()
