"""A language model trains on shards in a real object store: resumed exactly, bounded, and its loss is the mean over tokens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ml.errors import ConfigError, DataError
from ml.language_model.job import LanguageModelJob, open_shards
from ml.language_model.prepare import main as prepare
from ml.settings import load_settings
from ml.storage.artifacts import ArtifactStore
from ml.storage.shards import parse_shards_uri
from ml.training.batches import Sampler
from ml.training.job import TrainingJob, load_job, plan_of
from ml.training.prefetch import BatchKey, Prefetcher
from ml.training.ranks import RankGroup
from ml.training.shares import deal_rows
from ml.training.spec import Optimizer, TrainSpec
from ml.training.stepping import Stepper
from services.object_store import ObjectStoreEndpoint
from tests.ml.language_model.texts import make_texts, write_tokenizer
from tests.ml.training.shard_sets import VOCABULARY, random_rows, write_set

MODEL = {"width": 16, "num_layers": 1, "num_heads": 2, "hidden": 24}


@pytest.fixture
def stored_sets(
    tmp_path: Path,
    object_store_endpoint: ObjectStoreEndpoint,
    s3_artifact_store: ArtifactStore,
    bucket_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Prepared by the command, found by the environment: nothing here is a stand-in."""
    monkeypatch.setenv("MILLSTREAM_S3_ENDPOINT", object_store_endpoint.endpoint)
    monkeypatch.setenv("MILLSTREAM_S3_ACCESS_KEY", object_store_endpoint.access_key)
    monkeypatch.setenv("MILLSTREAM_S3_SECRET_KEY", object_store_endpoint.secret_key)
    monkeypatch.setenv("MILLSTREAM_BUCKET_PREFIX", bucket_prefix)
    place = f"s3://{s3_artifact_store.datasets_bucket}/corpus"
    texts = make_texts(800)
    for number, text in enumerate(texts):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", texts[:50])
    arguments = [str(tmp_path / "texts"), "--tokenizer", str(tokenizer), "--out", place, "--context", "15"]
    load_settings.cache_clear()
    assert prepare([*arguments, "--validation-share", "0.1", "--shard-mb", "0.003"]) == 0
    yield place
    load_settings.cache_clear()


def make_job(work_dir: Path, place: str, cache_bytes: int = 40_000) -> LanguageModelJob:
    return LanguageModelJob(
        work_dir, shards=f"{place}/train", validation_shards=f"{place}/validation", model=MODEL, cache_bytes=cache_bytes
    )


def sampler_of(job: LanguageModelJob) -> Sampler:
    return Sampler(np.arange(len(job.lengths["train"])), job.lengths["train"], 8, seed=3, shards=job.train_shards)


def cached_bytes(folder: Path) -> int:
    sizes = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # it went meanwhile
            sizes.append(path.stat().st_size)
    return sum(sizes)


def test_a_training_streams_from_the_store_and_resumes_in_the_middle_of_an_epoch(tmp_path: Path, stored_sets: str) -> None:
    job = make_job(tmp_path / "work", stored_sets)
    sampler = sampler_of(job)
    seen, batches = [], []
    for step in range(sampler.steps_per_epoch):
        job.expect_shards(sampler.shards_ahead(step))
        rows = sampler.rows(step)
        seen += rows.tolist()
        batches.append(job.batch("train", rows))
        assert cached_bytes(tmp_path / "work" / "shards" / "train") <= 30_000
    assert sorted(seen) == list(range(len(job.lengths["train"])))
    whole = sum(entry.bytes for entry in job._sets["train"].index.shards)
    assert whole > 2 * 30_000, "several times what the cache may hold"

    # Another machine: nothing is cached there.
    half = sampler.steps_per_epoch // 2
    resumed = make_job(tmp_path / "other", stored_sets)
    other = sampler_of(resumed)
    for step in range(half, half + 10):
        batch = resumed.batch("train", other.rows(step))
        assert all(torch.equal(batch[name], batches[step][name]) for name in batch)
    assert resumed.batch("validation", np.arange(3))["input_ids"].shape == (3, 15)


def test_a_damaged_shard_in_the_store_is_named(tmp_path: Path, stored_sets: str, s3_artifact_store: ArtifactStore) -> None:
    bucket, prefix = parse_shards_uri(stored_sets)
    key = f"{prefix}/train/shard-00003.safetensors"
    data = bytearray(s3_artifact_store.objects.get(bucket, key))
    data[-1] ^= 1
    s3_artifact_store.objects.put(bucket, key, bytes(data))
    job = make_job(tmp_path / "work", stored_sets)
    row = job.train_shards.starts[3:4]
    job.batch("train", row - 1)
    with pytest.raises(DataError, match=rf"shard-00003\.safetensors of {stored_sets}/train is damaged"):
        job.batch("train", row)
    s3_artifact_store.objects.delete(bucket, key)
    with pytest.raises(DataError, match=rf"{stored_sets}/train has no file shard-00003\.safetensors"):
        job.batch("train", row)
    with pytest.raises(DataError, match=r"has no file index\.json"):
        make_job(tmp_path / "work", stored_sets + "/nothing")


def local_job(tmp_path: Path, num_rows: int = 200, **arguments) -> LanguageModelJob:
    write_set(tmp_path / "set", random_rows(num_rows))
    return LanguageModelJob(tmp_path / "work", shards=str(tmp_path / "set"), model=MODEL, **arguments)


def test_rows_are_shifted_and_padded(tmp_path: Path) -> None:
    job = local_job(tmp_path)
    rows = random_rows(200)
    batch = job.batch("train", np.array([5, 9]))
    for index, row in enumerate((5, 9)):
        count = len(rows[row]) - 1
        assert batch["input_ids"][index, :count].tolist() == rows[row][:-1].tolist()
        assert batch["targets"][index, :count].tolist() == rows[row][1:].tolist()
        assert set(batch["targets"][index, count:].tolist()) <= {-100}
        assert job.lengths["train"][row] == count == job.row_weights("train", np.array([row]))[0]
    assert len(job.lengths["validation"]) == 2
    assert job.batch("validation", np.array([1]))["input_ids"][0, 0] == rows[199][0]


def test_loss_of_a_step_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    job = local_job(tmp_path)
    stepper = Stepper(spec_of(tmp_path), job, RankGroup())
    rows = np.array([3, 50, 8, 120])
    batch = job.batch("train", rows)
    with torch.no_grad():
        logits = stepper.model(batch["input_ids"])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    found = stepper.train_step(rows, stepper.new_optimizer(0.0), "fp32", 0.0)
    assert found.loss == pytest.approx(float(expected), rel=1e-6)
    with torch.no_grad():
        alone = [float(job.row_losses(stepper.model, job.batch("train", np.array([row]))).loss) for row in rows]
    assert np.average(alone, weights=job.row_weights("train", rows)) == pytest.approx(found.loss, rel=1e-5), "padding changes nothing"


def spec_of(tmp_path: Path) -> TrainSpec:
    return TrainSpec(
        job="ml.language_model.job:LanguageModelJob",
        work_dir=tmp_path / "work",
        job_arguments={"shards": str(tmp_path / "set"), "model": MODEL},
        num_ranks=1,
        optimizer=Optimizer(gradient_clip=1.0),
        precision="fp32",
    )


def test_a_language_is_learned_through_sampler_prefetcher_and_shares(tmp_path: Path) -> None:
    """Each token is followed by the next number: a loss near zero can be reached, and 6.2 is chance."""
    write_set(tmp_path / "set", [(np.arange(12) + start) % VOCABULARY for start in range(2 * VOCABULARY)], shard_bytes=2000)
    job: TrainingJob = load_job(spec_of(tmp_path))
    assert isinstance(job, LanguageModelJob)
    stepper = Stepper(spec_of(tmp_path), job, RankGroup())
    optimizer = stepper.new_optimizer(0.02)
    sampler = Sampler(np.arange(len(job.lengths["train"])), job.lengths["train"], 32, 0, max_tokens=400, shards=job.train_shards)
    losses = []
    with Prefetcher(lambda key: job.batch("train", key.row_array), depth=2) as prefetcher:
        taken = iter(range(1000))
        stepper.load_batch = lambda split, rows: prefetcher.take(BatchKey.of(next(taken), rows))
        for step in range(3 * sampler.steps_per_epoch):
            job.expect_shards(sampler.shards_ahead(step))
            for ahead in range(step, step + 2):
                prefetcher.ask(BatchKey.of(ahead, deal_rows(sampler.rows(ahead), job.lengths["train"], 1)[0]))
            rows, shares = deal_rows(sampler.rows(step), job.lengths["train"], 1)
            losses.append(stepper.train_step(rows, optimizer, "fp32", 0.02, shares=shares).loss)
    stepper.load_batch = job.batch
    assert losses[0] == pytest.approx(np.log(VOCABULARY), rel=0.05)
    assert np.mean(losses[-5:]) < 0.5
    assert stepper.evaluate("validation", [np.arange(len(job.lengths["validation"]))], "fp32").loss < 0.6


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="raise vocab_size and max_length"):
        write_set(tmp_path / "set", random_rows(50))
        LanguageModelJob(tmp_path, shards=str(tmp_path / "set"), model={**MODEL, "max_length": 8})
    with pytest.raises(DataError, match="single row"):
        write_set(tmp_path / "one", random_rows(1))
        LanguageModelJob(tmp_path, shards=str(tmp_path / "one"), model=MODEL)
    digest = write_set(tmp_path / "known", random_rows(50)).digest
    LanguageModelJob(tmp_path, shards=str(tmp_path / "known"), model=MODEL, shards_sha256=digest)
    assert write_set(tmp_path / "changed", random_rows(50, seed=1)).digest != digest
    with pytest.raises(DataError, match="not the set that was given"):
        LanguageModelJob(tmp_path, shards=str(tmp_path / "changed"), model=MODEL, shards_sha256=digest)
    for uri in ("s3://bucket", "s3:///x", "s3://bucket/a/../b"):
        with pytest.raises(ConfigError, match="s3://bucket/prefix"):
            parse_shards_uri(uri)
    assert str(open_shards(str(tmp_path))) == str(tmp_path)


def test_its_plan_pads_targets_so_that_they_do_not_count(tmp_path: Path) -> None:
    plan = plan_of(local_job(tmp_path))
    assert plan.padding == {"input_ids": 0, "targets": -100}
    assert plan.blocks == ("blocks.0",)
