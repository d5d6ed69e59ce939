"""Held-out rows with the replies that the offline evaluation says they must get."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ml.deployment import TOLERANCE
from ml.errors import DeploymentError
from ml.predictor import load_predictor
from ml.solution import Scores, SolutionSpec

if TYPE_CHECKING:
    import pandas as pd


def held_out_replies(folder: Path, spec: SolutionSpec, table: "pd.DataFrame", offline: Scores, num_rows: int) -> list[tuple[dict, dict]]:
    """Pairs of (request, reply) whose scores equal the stored ones.

    Args:
        folder: the bundle to be served.
        table: the test table.
        offline: the scores that the report's figures were computed from.

    Raises:
        DeploymentError: the bundle scores a row otherwise than when it was evaluated.
    """
    positions = {row_id: position for position, row_id in enumerate(offline.row_ids)}
    rows = table.loc[[row for row, row_id in enumerate(table["row_id"]) if row_id in positions][:num_rows]]
    predictor = load_predictor(folder)
    scores = spec.score(predictor, rows)
    stored = offline.take(np.array([positions[row_id] for row_id in scores.row_ids], dtype=int))
    for column, values in scores.columns.items():
        difference = np.abs(values.astype(np.float64) - stored.columns[column].astype(np.float64)).reshape(len(values), -1).max(axis=1)
        worst = int(difference.argmax())
        if not difference[worst] <= TOLERANCE:
            raise DeploymentError(
                f"row {scores.row_ids[worst]}: `{column}` is off by {difference[worst]:.3g} from the offline evaluation "
                f"(at most {TOLERANCE:g}); the bundle is not the one that was evaluated, or this machine computes differently"
            )
    requests = spec.requests(rows)
    return [(request, predictor.predict([request])[0]) for request in requests]
