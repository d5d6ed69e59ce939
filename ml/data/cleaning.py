"""The clean stage: what clean means is the solution's affair; here its tables are stored and its counts recorded."""

import logging

from ml.artifacts import CleanDataset, RawDataset
from ml.config import CleanConfig
from ml.errors import DataError
from ml.solution import SolutionSpec
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)


def clean(raw: RawDataset, spec: SolutionSpec, config: CleanConfig, store: ArtifactStore) -> CleanDataset:
    """Run the solution's cleaning over the raw table.

    Raises:
        DataError: no row is left.
    """
    kept, dropped, counts = spec.clean(store.get_frame(raw.table), config)
    for rule, count in counts.items():
        if count:
            logger.info("cleaning rule %s: %d rows", rule, count)
    if len(kept) == 0:
        reasons = ", ".join(f"{rule} {count}" for rule, count in counts.items() if count)
        raise DataError(f"{raw.source}: cleaning left none of {raw.num_rows} rows ({reasons}); check the text column, TEXT=…")
    return CleanDataset(
        table=store.put_frame(kept),
        dropped=store.put_frame(dropped),
        num_rows_in=raw.num_rows,
        num_rows=len(kept),
        rule_counts=counts,
    )
