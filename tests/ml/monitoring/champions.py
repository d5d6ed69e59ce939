"""A champion with the records that a real run leaves behind, and a predictor's log of what it answers."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd

from ml.artifacts import Decision, Evaluation, RawDataset, SplitDataset
from ml.bundles import schema_digest
from ml.config import RunRequest, resolve_config
from ml.data.ingest import row_ids
from ml.evaluation.quality import evaluate_scores
from ml.monitoring.records import LoggedFeedback, LoggedPrediction, cut_request, to_line
from ml.outcome import RunRecords
from ml.predictor import Predictor, load_predictor
from ml.registry import ModelVersion, Registry, version_id
from ml.solution import load_solution
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from tests.tiny_bundles import build_tiny_bundle

LABELS = ("negative", "positive")
TRAINED = datetime(2026, 3, 1, tzinfo=UTC)
ACCURACY_NOISE = 10  # every tenth label is not what the model answers, so its accuracy is 0.9


@dataclass
class Champion:
    """One model in the registry."""

    store: ArtifactStore
    name: str
    version: ModelVersion
    predictor: Predictor

    def answer(
        self, texts: Sequence[str], when: datetime, *, prefix: str = "p", version: str | None = None, spread_minutes: int = 60
    ) -> list[LoggedPrediction]:
        """Log answers to these texts as the predictor does, in the minutes before `when`."""
        replies = self.predictor.predict([{"text": text} for text in texts])
        rows = []
        for index, (text, reply) in enumerate(zip(texts, replies, strict=True)):
            answered = when - timedelta(minutes=1 + index % spread_minutes)
            request, cut = cut_request({"text": text})
            version = version or self.version.version
            rows.append(LoggedPrediction(answered.isoformat(), f"{prefix}{index:023d}", 0, self.name, version, request, reply, cut))
        for hour in {row.answered.replace(minute=0, second=0, microsecond=0) for row in rows}:
            mine = [row for row in rows if hour <= row.answered < hour + timedelta(hours=1)]
            key = keys.prediction_log(self.name, f"{hour:%Y-%m-%d}", f"{hour:%H}", f"part-{prefix}")
            self.store.objects.put(self.store.monitoring_bucket, key, b"".join(map(to_line, mine)))
        return rows

    def tell(self, rows: Sequence[LoggedPrediction], labels: Sequence[str], when: datetime, *, part: str = "part") -> None:
        """Store labels for these rows, told at a moment, as the predictor does."""
        told = [LoggedFeedback(when.isoformat(), row.id, row.item, self.name, label) for row, label in zip(rows, labels, strict=True)]
        key = keys.feedback_log(self.name, f"{when:%Y-%m-%d}", part)
        self.store.objects.put(self.store.monitoring_bucket, key, b"".join(map(to_line, told)))

    def put_data(self, file_name: str, texts: Sequence[str], labels: Sequence[str] | None = None) -> None:
        """Put a CSV under the model's prefix, now."""
        columns = {"text": list(texts)} | ({"label": list(labels)} if labels is not None else {})
        data = pd.DataFrame(columns).to_csv(index=False).encode()
        self.store.objects.put(self.store.datasets_bucket, keys.dataset_prefix(self.name) + file_name, data)


def make_champion(
    store: ArtifactStore, texts: Sequence[str], *, name: str = "reviews", bundle_seed: int = 22, trained: datetime = TRAINED
) -> Champion:
    """Register a tiny model as if a run had trained it on these texts: 70 % train, 10 % validation, 20 % test.

    With the bundle seeds 19 and 22 it answers both classes.

    Labels are what the model answers but for every tenth, so its test accuracy is 0.9.
    """
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_tiny_bundle(Path(folder), seed=bundle_seed, labels=LABELS)
        predictor = load_predictor(Path(folder))
        reference = store.put_folder(Path(folder))
    spec = load_solution("sentiment")
    answers = [reply["label"] for reply in predictor.predict([{"text": text} for text in texts])]
    labels = noisy(answers)
    table = pd.DataFrame({"row_id": row_ids(texts, labels), "text": texts, "label": labels})
    table["target"] = [LABELS.index(label) for label in labels]
    starts = (0, int(0.7 * len(table)), int(0.8 * len(table)), len(table))
    parts = {split: table.iloc[start:end] for split, start, end in zip(("train", "validation", "test"), starts, starts[1:], strict=False)}
    splits = SplitDataset(
        **{split: store.put_frame(part) for split, part in parts.items()},
        labels=LABELS,
        positive_label="positive",
        counts={split: {label: int((part["label"] == label).sum()) for label in LABELS} for split, part in parts.items()},
    )
    config = resolve_config(RunRequest(data="s3://datasets/reviews/", name=name))
    evaluations = {
        split: Evaluation(
            variant="static_int8",
            quality=evaluate_scores(spec.score(predictor, parts[split]), spec, split, splits, config.evaluate, None, store),
        )
        for split in ("validation", "test")
    }
    records = RunRecords(
        raw=RawDataset(source="test", objects={}, table=store.put_frame(table[["row_id", "text", "label"]]), num_rows=len(table)),
        splits=splits,
        decision=Decision(status="selected", variant="static_int8", reasons=()),
        validation=(evaluations["validation"],),
        test=(evaluations["test"],),
    )
    run_id = f"{trained:%Y%m%dT%H%M%SZ}-{bundle_seed:06d}"
    manifest = {"run_id": run_id, "name": name, "records": records.model_dump(mode="json")}
    store.objects.put(store.runs_bucket, keys.run_file(run_id, "manifest.json"), json.dumps(manifest).encode())
    store.objects.put(store.runs_bucket, keys.run_file(run_id, "config.json"), config.model_dump_json().encode())
    version = ModelVersion(
        name=name,
        version=version_id(trained, reference),
        solution="sentiment",
        bundle=reference,
        schema_digest=schema_digest(bundle),
        options=bundle.options,
        run_id=run_id,
        metrics={metric: interval.value for metric, interval in evaluations["test"].quality.metrics.items()},
        created=trained,
    )
    registry = Registry(store)
    registry.add_version(version)
    registry.promote(name, version.version, "test", "because")
    return Champion(store, name, version, predictor)


def noisy(answers: Sequence[str]) -> list[str]:
    """True labels: what the model answers, but for every tenth."""
    return [wrong(label) if row % ACCURACY_NOISE == 0 else label for row, label in enumerate(answers)]


def wrong(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]
