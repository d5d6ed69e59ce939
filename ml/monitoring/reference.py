"""What the champion was trained on, and how it answered rows that it was not trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from ml.artifacts import Evaluation, SplitDataset
from ml.config import DataConfig, RunConfig
from ml.data.words import words_of
from ml.errors import DataError, ObjectNotFoundError
from ml.evaluation.quality import scores_from_frame
from ml.monitoring.drift import AnswerSample, TextSample, distinct
from ml.monitoring.records import cut_request
from ml.outcome import RunRecords
from ml.registry import ModelVersion
from ml.solution import SolutionSpec, load_solution
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

if TYPE_CHECKING:
    import pandas as pd

MAX_VOCABULARY_ROWS = 20_000


@dataclass(frozen=True)
class Reference:
    """The champion, and samples of its data.

    Args:
        texts: held-out rows (validation and test) as they were read, before cleaning: callers do not clean their texts either.
        known_words: words of training rows, likewise as they were read.
        answers: of the held-out rows that were scored; None when the model is no classifier.
    """

    version: ModelVersion
    spec: SolutionSpec
    splits: SplitDataset
    data: DataConfig
    texts: TextSample
    known_words: frozenset[str]
    answers: AnswerSample | None

    @property
    def labels(self) -> tuple[str, ...]:
        """The class of every row, by the split dataset's counts."""
        return tuple(label for counts in self.splits.counts.values() for label, rows in counts.items() for _ in range(rows))


def load_reference(store: ArtifactStore, version: ModelVersion, *, max_rows: int, seed: int = 0) -> Reference:
    """Read back what a version's run has kept.

    Raises:
        DataError: the run left no manifest, so it is not known what the version was trained on.
    """
    spec = load_solution(version.solution)
    records, config = _read_run(store, version)
    splits, raw = records.splits, records.raw
    if splits is None or raw is None:
        raise DataError(f"{version.name} {version.version}: its run {version.run_id} has no split data; train the model again")
    table = store.get_frame(raw.table).set_index("row_id", drop=False)
    parts = {split: store.get_frame(getattr(splits, split))["row_id"] for split in ("train", "validation", "test")}
    train = _sample(table.loc[parts["train"]], MAX_VOCABULARY_ROWS, seed)
    # More than is wanted: texts that are the same count once.
    held_out = _sample(table.loc[[*parts["validation"], *parts["test"]]], 2 * max_rows, seed)
    texts = request_texts(spec.requests(held_out))
    return Reference(
        version=version,
        spec=spec,
        splits=splits,
        data=config.data,
        texts=TextSample(tuple(texts[position] for position in distinct(texts)[:max_rows])),
        known_words=frozenset(word for text in request_texts(spec.requests(train)) for word in words_of(text)),
        answers=_answers(store, records, splits.labels),
    )


def run_started(run_id: str) -> datetime:
    """When a run began, from its id. Raises DataError when the id is not one that a run gives."""
    try:
        return datetime.strptime(run_id.partition("-")[0], "%Y%m%dT%H%M%S%z")
    except ValueError as error:
        raise DataError(f"{run_id!r} is no run's id, so what its model was trained on is not known; train the model again") from error


def request_texts(requests: Sequence[dict]) -> list[str]:
    """The text of each request: its strings, cut as the prediction log cuts them. Requests without any are left out."""
    return [text for request in requests if (text := request_text(cut_request(request)[0]))]


def request_text(request: dict | None) -> str:
    """All strings of a request, or "" when it has none."""
    strings = [value for value in (request or {}).values() if isinstance(value, str)]
    # JSON can carry half of a surrogate pair, which is no text.
    return "\n".join(strings).encode(errors="replace").decode().strip()


def _read_run(store: ArtifactStore, version: ModelVersion) -> tuple[RunRecords, RunConfig]:
    try:
        manifest = store.objects.get(store.runs_bucket, keys.run_file(version.run_id, "manifest.json"))
        config = store.objects.get(store.runs_bucket, keys.run_file(version.run_id, "config.json"))
    except ObjectNotFoundError as error:
        raise DataError(
            f"{version.name} {version.version} cannot be checked: its run {version.run_id} left no manifest, so what it was trained "
            "on is not known; train the model again"
        ) from error
    return RunRecords.model_validate(json.loads(manifest)["records"]), RunConfig.model_validate_json(config)


def _answers(store: ArtifactStore, records: RunRecords, labels: Sequence[str]) -> AnswerSample | None:
    chosen = records.decision.variant if records.decision else None
    evaluations: list[Evaluation] = [item for item in (*records.validation, *records.test) if item.variant == chosen]
    answered, probabilities = [], []
    for evaluation in evaluations:
        scores = scores_from_frame(store.get_frame(evaluation.quality.scores))
        if "probabilities" not in scores.columns:
            return None
        rows = scores.columns["probabilities"]
        answered += [labels[index] for index in rows.argmax(axis=1)]
        probabilities += rows.max(axis=1).tolist()
    return AnswerSample(tuple(answered), tuple(probabilities)) if answered else None


def _sample(frame: "pd.DataFrame", num_rows: int, seed: int) -> "pd.DataFrame":
    return frame.sample(min(num_rows, len(frame)), random_state=seed)
