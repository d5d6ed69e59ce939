"""What is kept for how long: the request of a clean-up, its report, and what has had its time in each bucket.

Whatever a run may still need in the runs bucket is the business of `ml.garbage`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from ml.artifacts import Record
from ml.errors import ObjectNotFoundError
from ml.registry import Registry
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

NUM_EXAMPLES = 5


class CleanUpRequest(BaseModel):
    """What a clean-up may delete: the form in the Prefect UI and the options of `millstream clean-up`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dry_run: bool = Field(default=True, description="only tell what would be deleted")
    keep_runs: int = Field(default=20, ge=1, le=100_000, description="runs of each model that are kept, the last ones")
    keep_run_days: float = Field(default=30, ge=0, le=36_500, description="runs younger than this are kept as well")
    delete_versions: bool = Field(default=False, description="delete old model versions; those under an alias always stay")
    keep_versions: int = Field(default=20, ge=1, le=100_000, description="versions of each model that are kept, the last ones")
    grace_hours: float = Field(
        default=72,
        ge=0,
        le=8760,
        description="what is younger stays, referenced or not: a killed run can be resumed for so long, and work without a lease is safe",
    )
    monitoring_days: float | None = Field(
        default=None,
        ge=0,
        le=36_500,
        description="logged predictions, feedback and drift checks older than this go; by default as MILLSTREAM_PREDICTION_LOG_DAYS says",
    )
    log_megabytes: float = Field(default=20, gt=0, le=100_000, description="what is kept of each local log file, its end")
    wait_minutes: float = Field(default=0, ge=0, le=1440, description="how long to wait for runs that are going on")

    @property
    def grace(self) -> timedelta:
        return timedelta(hours=self.grace_hours)


@dataclass(frozen=True)
class Garbage:
    """One object or file that may go. `place` is its key in the object store, or its path."""

    kind: str
    place: str
    size_bytes: int
    reason: str


class KindTotal(Record):
    """What goes of one kind."""

    kind: str
    count: int
    size_bytes: int
    reasons: dict[str, int] = Field(description="why -> how many")
    examples: tuple[str, ...] = Field(description="the first few keys or paths")


class CleanUpReport(Record):
    """What was deleted, or would be."""

    dry_run: bool
    totals: tuple[KindTotal, ...] = ()
    remarks: tuple[str, ...] = Field(default=(), description="what was left for another time, and why")
    run_ids: tuple[str, ...] = Field(default=(), description="runs that the object store keeps")

    @property
    def size_bytes(self) -> int:
        return sum(total.size_bytes for total in self.totals)


def sum_up(garbage: Iterable[Garbage], **fields: object) -> CleanUpReport:
    """One total per kind, in the order of their first appearance."""
    by_kind: dict[str, list[Garbage]] = defaultdict(list)
    for item in garbage:
        by_kind[item.kind].append(item)
    totals = [
        KindTotal(
            kind=kind,
            count=len(items),
            size_bytes=sum(item.size_bytes for item in items),
            reasons=dict(Counter(item.reason for item in items)),
            examples=tuple(item.place for item in items[:NUM_EXAMPLES]),
        )
        for kind, items in by_kind.items()
    ]
    return CleanUpReport.model_validate({"totals": totals, **fields})


def join_reports(reports: Sequence[CleanUpReport]) -> CleanUpReport:
    return CleanUpReport(
        dry_run=all(report.dry_run for report in reports),
        totals=tuple(total for report in reports for total in report.totals),
        remarks=tuple(remark for report in reports for remark in report.remarks),
        run_ids=tuple(run_id for report in reports for run_id in report.run_ids),
    )


def retained_runs(runs: Mapping[str, tuple[str, datetime]], needed: set[str], request: CleanUpRequest, now: datetime) -> set[str]:
    """Ids of the runs to keep: the last of each model, the young, and those that made what an alias points at.

    Args:
        runs: run id, which sorts by time -> (model name, when its last file was written).
        needed: ids of runs that stay in any case.
    """
    young = max(timedelta(days=request.keep_run_days), request.grace)
    kept = {run_id for run_id, (_, written) in runs.items() if run_id in needed or now - written <= young}
    by_name: dict[str, list[str]] = defaultdict(list)
    for run_id in sorted(runs):
        by_name[runs[run_id][0]].append(run_id)
    return kept.union(*(run_ids[-request.keep_runs :] for run_ids in by_name.values()))


def expired_versions(registry: Registry, request: CleanUpRequest, now: datetime) -> Iterator[tuple[str, str]]:
    """(name, version) of what is neither under an alias nor among the last versions of its model, nor made lately."""
    if not request.delete_versions:
        return
    for name in registry.list_names():
        aliases = registry.read_aliases(name)
        for version in registry.list_versions(name)[: -request.keep_versions]:
            if version in (aliases.champion, aliases.previous, aliases.candidate):
                continue
            if now - registry.get_version(name, version).created > request.grace:
                yield name, version


def delete_version(store: ArtifactStore, name: str, version: str) -> bool:
    """Delete a version unless an alias points at it; False when one does.

    Somebody may move an alias to it at this very moment. The alias is therefore read again afterwards, and the version
    put back if it is asked for; its bytes are still there, since artifacts are only deleted later.
    """
    registry = Registry(store)
    try:
        record = registry.get_version(name, version)
    except ObjectNotFoundError:
        return False

    def is_named() -> bool:
        aliases = registry.read_aliases(name)
        return version in (aliases.champion, aliases.previous, aliases.candidate)

    if is_named():
        return False
    store.objects.delete(store.registry_bucket, keys.model_version(name, version))
    if is_named():
        registry.add_version(record)
        return False
    return True


def clean_monitoring(store: ArtifactStore, request: CleanUpRequest, *, default_days: float) -> CleanUpReport:
    """Delete logged predictions, feedback and drift checks that have had their time, unless it is a dry run.

    Args:
        default_days: `Settings.prediction_log_days`, for a request that does not say.
    """
    days = default_days if request.monitoring_days is None else request.monitoring_days
    oldest = datetime.now(UTC) - timedelta(days=days)
    garbage = [
        Garbage(kind, info.key, info.size_bytes, f"older than {days:g} days")
        for info in store.objects.list(store.monitoring_bucket)
        if (kind := keys.parse_monitoring_key(info.key)) and info.modified < oldest
    ]
    if not request.dry_run:
        for item in garbage:
            store.objects.delete(store.monitoring_bucket, item.place)
    return sum_up(garbage, dry_run=request.dry_run)
