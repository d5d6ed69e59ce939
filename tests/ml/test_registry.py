"""Versions never change, aliases never lose a move: on the store in memory and on the real server."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from ml.artifacts import ArtifactRef, BundleRef
from ml.errors import ConfigError, DeploymentError, ObjectNotFoundError, StorageUnavailableError, WriteConflictError
from ml.registry import Aliases, ModelVersion, Registry, version_id
from ml.storage.artifacts import ArtifactStore, digest_bytes
from ml.storage.base import ObjectInfo
from ml.storage.memory import MemoryStore

CREATED = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.fixture(params=["memory", "s3"])
def registry(request: pytest.FixtureRequest) -> Registry:
    return Registry(request.getfixturevalue("artifact_store" if request.param == "memory" else "s3_artifact_store"))


def make_version(number: int, *, name: str = "reviews", schema_digest: str = "schema") -> ModelVersion:
    sha256 = digest_bytes(f"bundle {number}".encode())
    bundle = BundleRef(files={"bundle.json": ArtifactRef(uri=f"s3://runs/{sha256}", sha256=sha256, size_bytes=10)})
    created = CREATED + timedelta(minutes=number)
    return ModelVersion(
        name=name,
        version=version_id(created, bundle),
        solution="sentiment",
        bundle=bundle,
        schema_digest=schema_digest,
        options={"labels": ("negative", "positive")},
        run_id="run",
        created=created,
    )


def add_versions(registry: Registry, count: int, **fields: str) -> list[str]:
    return [registry.add_version(make_version(number, **fields)).version for number in range(count)]


def test_a_version_comes_back_as_it_was_added(registry: Registry):
    version = make_version(1)
    registry.add_version(version)
    assert registry.get_version("reviews", version.version).model_dump(mode="json") == version.model_dump(mode="json")


def test_a_version_id_says_the_time_in_utc_and_the_bundle():
    bundle = make_version(1).bundle
    elsewhere = CREATED.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    assert version_id(elsewhere, bundle) == f"20260304T050607Z-{bundle.digest[:8]}"


def test_a_version_that_does_not_name_its_bundle_is_refused():
    values = make_version(1).model_dump()
    with pytest.raises(ValidationError, match="version must be"):
        ModelVersion.model_validate({**values, "version": "20260304T050607Z-00000000"})


def test_adding_the_same_version_again_does_nothing_but_other_contents_are_refused(registry: Registry):
    version = make_version(1)
    registry.add_version(version)
    registry.add_version(version)
    with pytest.raises(WriteConflictError, match="never changed"):
        registry.add_version(version.model_copy(update={"run_id": "another run"}))
    assert registry.get_version("reviews", version.version).run_id == "run"


def test_a_missing_version_is_an_error_that_names_the_known_ones(registry: Registry):
    (known,) = add_versions(registry, 1)
    for missing in ("20200101T000000Z-00000000", "../../reviews/aliases", ""):
        with pytest.raises(ObjectNotFoundError, match=known):
            registry.get_version("reviews", missing)
    with pytest.raises(ObjectNotFoundError, match="none"):
        registry.promote("nothing-here", known, "test", "no such version")


def test_versions_and_names_are_listed_in_order(registry: Registry):
    versions = add_versions(registry, 3)
    add_versions(registry, 1, name="reviews-2")
    add_versions(registry, 1, name="answers")
    registry.promote("reviews", versions[0], "test", "an alias is not a version")
    assert registry.list_versions("reviews") == versions
    assert registry.list_versions("nothing-here") == []
    assert registry.list_names() == ["answers", "reviews", "reviews-2"]


@pytest.mark.parametrize("name", ["", "Reviews", "a/b", "../x", "-x", "x" * 64])
def test_a_name_that_is_none_is_refused(registry: Registry, name: str):
    for call in (lambda: registry.read_aliases(name), lambda: registry.list_versions(name), lambda: registry.rollback(name, "test", "x")):
        with pytest.raises(ConfigError, match="not a model name"):
            call()


def test_aliases_of_an_unknown_model_are_empty(registry: Registry):
    assert registry.read_aliases("nothing-here") == Aliases()


def test_promoting_moves_the_old_champion_to_previous(registry: Registry):
    first, second, third = add_versions(registry, 3)
    registry.set_candidate("reviews", first, "trainer", "passed its gates")
    assert registry.read_aliases("reviews").candidate == first
    registry.promote("reviews", first, "deployer", "first one")
    assert registry.read_aliases("reviews").candidate is None
    registry.set_candidate("reviews", third, "trainer", "still being judged")
    registry.promote("reviews", second, "deployer", "better")
    aliases = registry.read_aliases("reviews")
    assert (aliases.candidate, aliases.champion, aliases.previous, aliases.generation) == (third, second, first, 4)
    assert (aliases.who, aliases.why) == ("deployer", "better")
    assert aliases.when is not None
    assert datetime.now(UTC) - aliases.when < timedelta(minutes=1)


def test_promoting_the_champion_again_moves_nothing(registry: Registry):
    first, second = add_versions(registry, 2)
    registry.promote("reviews", first, "test", "first")
    promoted = registry.promote("reviews", second, "test", "second")
    assert registry.promote("reviews", second, "test", "again") == promoted == registry.read_aliases("reviews")
    assert promoted.previous == first


def test_a_candidate_can_be_withdrawn(registry: Registry):
    (version,) = add_versions(registry, 1)
    registry.set_candidate("reviews", version, "test", "new")
    assert registry.set_candidate("reviews", None, "test", "rejected") == registry.read_aliases("reviews")
    assert registry.read_aliases("reviews").candidate is None


def test_a_rollback_exchanges_champion_and_previous(registry: Registry):
    first, second = add_versions(registry, 2)
    registry.promote("reviews", first, "test", "first")
    registry.promote("reviews", second, "test", "second")
    registry.rollback("reviews", "test", "worse than it looked")
    aliases = registry.read_aliases("reviews")
    assert (aliases.champion, aliases.previous, aliases.generation) == (first, second, 3)


def test_a_rollback_without_a_previous_version_is_an_error_that_says_what_can_be_promoted(registry: Registry):
    (only,) = add_versions(registry, 1)
    with pytest.raises(DeploymentError, match=only):
        registry.rollback("reviews", "test", "no champion")
    registry.promote("reviews", only, "test", "first")
    with pytest.raises(DeploymentError, match="no previous version"):
        registry.rollback("reviews", "test", "nothing before it")
    assert registry.read_aliases("reviews").champion == only


def test_a_withdrawn_version_leaves_the_aliases_as_they_were(registry: Registry):
    first, second, third = add_versions(registry, 3)
    registry.promote("reviews", first, "test", "first")
    registry.promote("reviews", second, "test", "second")
    before = registry.read_aliases("reviews")
    registry.promote("reviews", third, "test", "third")
    for _ in range(2):
        registry.withdraw("reviews", third, before, "test", "unhealthy")
        aliases = registry.read_aliases("reviews")
        assert (aliases.champion, aliases.previous, aliases.generation) == (second, first, 4)
    assert registry.rollback("reviews", "test", "never to the withdrawn one").champion == first


def test_the_first_version_of_a_model_can_be_withdrawn(registry: Registry):
    (only,) = add_versions(registry, 1)
    before = registry.read_aliases("reviews")
    registry.promote("reviews", only, "test", "first")
    aliases = registry.withdraw("reviews", only, before, "test", "unhealthy")
    assert (aliases.champion, aliases.previous) == (None, None)


def test_nothing_is_withdrawn_once_somebody_else_moved_the_champion(registry: Registry):
    first, second, third = add_versions(registry, 3)
    registry.promote("reviews", first, "test", "first")
    before = registry.read_aliases("reviews")
    registry.promote("reviews", second, "test", "second")
    registry.promote("reviews", third, "somebody", "meanwhile")
    with pytest.raises(DeploymentError, match="somebody"):
        registry.withdraw("reviews", second, before, "test", "unhealthy")
    assert registry.read_aliases("reviews").champion == third


def test_a_model_with_another_schema_needs_another_name(registry: Registry):
    first = make_version(1)
    other = make_version(2, schema_digest="seven classes")
    for version in (first, other):
        registry.add_version(version)
    registry.check_comparable("reviews", "anything goes before there is a champion")
    registry.promote("reviews", first.version, "test", "first")
    for call in (
        lambda: registry.set_candidate("reviews", other.version, "test", "x"),
        lambda: registry.promote("reviews", other.version, "test", "x"),
        lambda: registry.check_comparable("reviews", "seven classes"),
    ):
        with pytest.raises(ConfigError, match="NAME="):
            call()
    registry.check_comparable("reviews", "schema")
    assert registry.read_aliases("reviews").generation == 1


def test_no_move_of_concurrent_writers_is_lost(registry: Registry):
    num_writers, num_moves = 4, 4
    versions = add_versions(registry, num_writers * num_moves)
    returned: list[Aliases] = []
    problems: list[Exception] = []

    def write(number: int) -> None:
        for version in versions[number::num_writers]:
            try:
                returned.append(registry.promote("reviews", version, f"writer {number}", version))
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(num_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    # Every move is there, each counted once, each made on top of the one before it.
    moves = sorted(returned, key=lambda aliases: aliases.generation)
    assert [move.generation for move in moves] == list(range(1, len(versions) + 1))
    assert {move.champion for move in moves} == set(versions)
    assert [move.previous for move in moves] == [None, *(move.champion for move in moves[:-1])]
    assert registry.read_aliases("reviews") == moves[-1]


class LossyStore(MemoryStore):
    """Loses replies of alias writes: the write is done or not, the caller hears nothing either way."""

    def __init__(self):
        super().__init__()
        self.plan: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def put(self, bucket: str, key: str, data: bytes | Path, **conditions) -> ObjectInfo:
        action = self.plan.pop(0) if key.endswith("aliases.json") and self.plan else "answer"
        if action == "lose request":
            raise StorageUnavailableError("no answer")
        info = super().put(bucket, key, data, **conditions)
        if action == "lose reply":
            self.meanwhile()
            raise StorageUnavailableError("no answer")
        return info


@pytest.fixture
def lossy() -> tuple[LossyStore, Registry, list[str]]:
    store = LossyStore()
    artifacts = ArtifactStore(store)
    artifacts.ensure_buckets()
    registry = Registry(artifacts)
    versions = add_versions(registry, 3)
    for version in versions[:2]:
        registry.promote("reviews", version, "test", version)
    return store, registry, versions


@pytest.mark.parametrize("lost", ["lose request", "lose reply"])
def test_a_rollback_whose_reply_was_lost_is_done_exactly_once(lossy: tuple[LossyStore, Registry, list[str]], lost: str):
    store, registry, versions = lossy
    store.plan = [lost]
    registry.rollback("reviews", "test", "unhealthy")
    aliases = registry.read_aliases("reviews")
    assert (aliases.champion, aliases.previous, aliases.generation) == (versions[0], versions[1], 3)


def test_a_move_in_doubt_is_not_repeated_over_somebody_elses(lossy: tuple[LossyStore, Registry, list[str]]):
    store, registry, versions = lossy
    store.plan = ["lose reply"]
    store.meanwhile = lambda: registry.promote("reviews", versions[2], "somebody", "meanwhile")
    with pytest.raises(WriteConflictError, match="somebody"):
        registry.rollback("reviews", "test", "unhealthy")
    assert registry.read_aliases("reviews").champion == versions[2]
