"""One optimizer step and one validation, shared out over the ranks so that their number changes nothing but the time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ml.training.batches import share_of_rank
from ml.training.job import Split, TrainingJob
from ml.training.precision import Precision, computing_in
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        loss: weighted mean over the global batch, the same in every rank.
        gradient_norm: before clipping, the same in every rank.
        finite: loss and gradient are; otherwise no weight was changed.
        asked_to_stop: some rank was.
        num_rows, num_tokens: of this rank.
        data_seconds: this rank waited for its batch.
        forward_seconds: of this rank alone, no waiting for others in it (but in a pipeline and with split matrices).
        backward_seconds: what of the communication is not hidden behind it is in it.
        update_seconds: clipping and the optimizer.
    """

    loss: float
    gradient_norm: float
    finite: bool
    asked_to_stop: bool
    num_rows: int
    num_tokens: int
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    update_seconds: float


@dataclass(frozen=True)
class Validation:
    """Over all rows of a split: weighted mean loss and, of a classifier, the share of rows that are right and the macro recall."""

    loss: float
    accuracy: float | None = None
    recall: float | None = None


class Stepper:
    """The model of one rank, and how it is stepped and validated together with the other ranks'.

    The gradient is that of the weighted mean loss over the global batch: each rank adds up its rows' weighted losses,
    divides by the weight of the *global* batch, and multiplies by the number of ranks, which averaging takes out again.
    So ranks may have unequal shares.
    """

    def __init__(self, spec: TrainSpec, job: TrainingJob, group: RankGroup):
        self.spec = spec
        self.job = job
        self.group = group
        self.model: nn.Module = job.build_model(spec.seed).to(group.device)
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._wrapped: nn.Module = self.model
        if group.num_ranks > 1:
            self._wrapped = DistributedDataParallel(
                self.model,
                device_ids=[group.device] if group.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=job.find_unused_parameters,
            )
        torch.manual_seed(spec.seed * 1_000_003 + group.rank)

    def new_optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        """AdamW (Loshchilov and Hutter 2019); vectors (biases, norms) do not decay."""
        matrices = [parameter for parameter in self.parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.parameters if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.spec.optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([entry for entry in groups if entry["params"]], lr=learning_rate, fused=True)

    def train_step(
        self,
        rows: np.ndarray,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        learning_rate: float,
        *,
        ask_to_stop: bool = False,
    ) -> StepResult:
        """One step on a global batch. Where loss or gradient are not finite, no rank changes a weight."""
        started = time.perf_counter()
        share, num_counting = share_of_rank(rows, self.group.rank, self.group.num_ranks)
        total_weight = float(self.job.row_weights("train", rows).sum())
        weights = self.job.row_weights("train", share)
        weights[num_counting:] = 0.0
        batch = self._batch("train", share)
        loaded = self._now()
        with computing_in(precision, self.group.device):
            losses = self.job.row_losses(self._wrapped, batch).loss
        weighted = (losses * self._as_tensor(weights, losses)).sum()
        forward_done = self._now()
        optimizer.zero_grad(set_to_none=True)
        (weighted * (self.group.num_ranks / total_weight)).backward()
        backward_done = self._now()
        for parameter in self.parameters:
            # A parameter that no row used: DDP may give zeros where a single rank gives nothing. Zeros for all.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.spec.optimizer.gradient_clip))
        loss_sum, num_asked = self.group.sum([float(weighted.detach()), float(ask_to_stop)])
        loss = loss_sum / total_weight
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for entry in optimizer.param_groups:
                entry["lr"] = learning_rate
            optimizer.step()
        return StepResult(
            loss=loss,
            gradient_norm=norm,
            finite=finite,
            asked_to_stop=num_asked > 0,
            num_rows=num_counting,
            num_tokens=int(self.job.lengths["train"][share[:num_counting]].sum()),
            data_seconds=loaded - started,
            forward_seconds=forward_done - loaded,
            backward_seconds=backward_done - forward_done,
            update_seconds=self._now() - backward_done,
        )

    def evaluate(
        self, split: Split, batches: list[np.ndarray], precision: Precision, beat: Callable[[], None] = lambda: None
    ) -> Validation:
        """Loss, accuracy and macro recall over all batches. Batch i goes to rank i modulo the number of ranks."""
        loss_sum = weight_sum = 0.0
        hits: dict[int, int] = {}
        totals: dict[int, int] = {}
        self.model.eval()
        with torch.inference_mode(), computing_in(precision, self.group.device):
            for rows in batches[self.group.rank :: self.group.num_ranks]:
                weights = self.job.row_weights(split, rows)
                result = self.job.row_losses(self.model, self._batch(split, rows))
                loss_sum += float((result.loss.double() * self._as_tensor(weights, result.loss.double())).sum())
                weight_sum += float(weights.sum())
                if result.predicted is not None and result.target is not None:
                    for target, predicted in zip(result.target.tolist(), result.predicted.tolist(), strict=True):
                        totals[target] = totals.get(target, 0) + 1
                        hits[target] = hits.get(target, 0) + int(target == predicted)
                beat()
        self.model.train()
        return self._validation(loss_sum, weight_sum, hits, totals)

    def _validation(self, loss_sum: float, weight_sum: float, hits: dict[int, int], totals: dict[int, int]) -> Validation:
        num_classes = int(self.group.largest(max(totals, default=-1) + 1))
        counts = [float(counted.get(label, 0)) for counted in (hits, totals) for label in range(num_classes)]
        loss_sum, weight_sum, *counts = self.group.sum([loss_sum, weight_sum, *counts])
        right, all_rows = np.array(counts[:num_classes]), np.array(counts[num_classes:])
        if not num_classes:
            return Validation(loss_sum / weight_sum)
        seen = all_rows > 0
        return Validation(
            loss=loss_sum / weight_sum,
            accuracy=float(right.sum() / all_rows.sum()),
            recall=float((right[seen] / all_rows[seen]).mean()),
        )

    def _batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.group.device) for name, tensor in self.job.batch(split, rows).items()}

    def _now(self) -> float:
        return time.perf_counter()

    @staticmethod
    def _as_tensor(weights: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(weights).to(device=like.device, dtype=like.dtype)
