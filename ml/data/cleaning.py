"""The clean stage: what clean means is the solution's affair; here its tables are stored and its counts recorded."""

import logging

from ml.artifacts import CleanDataset, RawDataset
from ml.config import CleanConfig
from ml.data.splitting import check_learnable
from ml.errors import DataError
from ml.solution import SolutionSpec
from ml.storage.artifacts import ArtifactStore

logger = logging.getLogger(__name__)


def clean(raw: RawDataset, spec: SolutionSpec, config: CleanConfig, store: ArtifactStore, *, min_rows_per_class: int = 1) -> CleanDataset:
    """Run the solution's cleaning over the raw table.

    Args:
        min_rows_per_class: what is asked of the split later is asked here already, so that too little data is told as
            that, and not as a share or a count of the data contract that it happens to break.

    Raises:
        DataError: no row, or only one class, is left, or a class has fewer than `min_rows_per_class` rows; names the
            class, its count, and what the rules dropped.
    """
    kept, dropped, counts = spec.clean(store.get_frame(raw.table), config)
    for rule, count in counts.items():
        if count:
            logger.info("cleaning rule %s: %d rows", rule, count)
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped["reason"].value_counts().sort_index().items())
    if len(kept) == 0:
        raise DataError(f"{raw.source}: cleaning left none of {raw.num_rows} rows ({reasons}); check the text column, TEXT=…")
    try:
        check_learnable(kept["label"].dropna().tolist(), min_rows_per_class)
    except DataError as error:
        lost = f"; cleaning dropped {len(dropped)} of {raw.num_rows} rows ({reasons})" if len(dropped) else ""
        raise DataError(f"{raw.source}: {error}{lost}") from error
    return CleanDataset(
        table=store.put_frame(kept),
        dropped=store.put_frame(dropped),
        num_rows_in=raw.num_rows,
        num_rows=len(kept),
        rule_counts=counts,
    )
