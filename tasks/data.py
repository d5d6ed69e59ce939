"""Ingest, clean, validate and split: tasks around `ml.data`."""

from ml.artifacts import CleanDataset, RawDataset, SplitDataset, ValidatedDataset
from ml.data.cleaning import clean
from ml.data.ingest import ingest
from ml.data.sources import open_source
from ml.data.splitting import split
from ml.data.validation import validate
from ml.runs import Run
from ml.solution import load_solution
from ml.stages import Stage, StageResult, run_stage
from ml.storage.connect import open_artifact_store
from tasks.options import stage_task

INGEST = Stage("ingest_data", 1, RawDataset, ("pandas", "pyarrow", "charset-normalizer"))
CLEAN = Stage("clean_data", 1, CleanDataset, ("pandas", "pyarrow", "ftfy", "datasketch"))
VALIDATE = Stage("validate_data", 1, ValidatedDataset, ("pandas", "pyarrow", "great-expectations"))
SPLIT = Stage("split_data", 1, SplitDataset, ("pandas", "pyarrow"))


@stage_task()
def ingest_data(run: Run) -> StageResult[RawDataset]:
    """Store the source objects as they came, and one table of their rows."""
    store, config = open_artifact_store(), run.config.data
    source = open_source(config, store)
    key = INGEST.key({item.name: item.sha256 for item in source.objects}, config)
    return run_stage(store, INGEST, key, lambda: ingest(source, config, store))


@stage_task()
def clean_data(run: Run, raw: RawDataset) -> StageResult[CleanDataset]:
    """Apply the cleaning rules; dropped rows are kept aside with the reason."""
    store, config = open_artifact_store(), run.config.clean
    spec = load_solution(run.config.solution)
    min_rows = run.config.split.min_rows_per_class  # not in the key: too few rows are an error, and errors are not kept
    key = CLEAN.key(raw.table.sha256, config, spec.name)
    return run_stage(store, CLEAN, key, lambda: clean(raw, spec, config, store, min_rows_per_class=min_rows))


@stage_task()
def validate_data(run: Run, cleaned: CleanDataset) -> StageResult[ValidatedDataset]:
    """Check the data contract; rows that break it go to quarantine with the rule's name."""
    store, contract = open_artifact_store(), run.config.contract
    key = VALIDATE.key(cleaned.table.sha256, cleaned.num_rows_in, contract)
    return run_stage(store, VALIDATE, key, lambda: validate(cleaned, contract, store))


@stage_task()
def split_data(run: Run, validated: ValidatedDataset) -> StageResult[SplitDataset]:
    """Assign every near-duplicate group to train, validation or test, for good."""
    store, config = open_artifact_store(), run.config
    key = SPLIT.key(validated.table.sha256, config.split, config.data)
    return run_stage(store, SPLIT, key, lambda: split(validated, config.split, config.data, store))
