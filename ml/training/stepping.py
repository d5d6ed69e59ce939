"""One optimizer step and one validation, shared out over the ranks so that their number changes nothing but the time."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ml.errors import TrainingError
from ml.training.batches import share_of_rank
from ml.training.job import Split, TrainingJob
from ml.training.precision import Precision, computing_in
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec


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
        groups = [{"params": matrices, "weight_decay": self.spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([entry for entry in groups if entry["params"]], lr=learning_rate, fused=True)

    def train_step(self, rows: np.ndarray, optimizer: torch.optim.Optimizer, precision: Precision, learning_rate: float) -> float:
        """One step on a global batch; returns its weighted mean loss, the same in every rank.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        share, num_counting = share_of_rank(rows, self.group.rank, self.group.num_ranks)
        total_weight = float(self.job.row_weights("train", rows).sum())
        weights = self.job.row_weights("train", share)
        weights[num_counting:] = 0.0
        with computing_in(precision, self.group.device):
            losses = self.job.row_losses(self._wrapped, self._batch("train", share)).loss
        weighted = (losses * self._as_tensor(weights, losses)).sum()
        optimizer.zero_grad(set_to_none=True)
        (weighted * (self.group.num_ranks / total_weight)).backward()
        for parameter in self.parameters:
            # A parameter that no row used: DDP may give zeros where a single rank gives nothing. Zeros for all.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.spec.gradient_clip))
        loss = self.group.sum([float(weighted.detach())])[0] / total_weight
        if not math.isfinite(loss) or not math.isfinite(norm):
            advice = "lower train.learning_rate" + (", or set train.precision to fp32" if precision != "fp32" else "")
            raise TrainingError(
                f"the loss is {loss} and the norm of the gradient {norm} at a learning rate of {learning_rate:.2g} ({precision}); {advice}"
            )
        for entry in optimizer.param_groups:
            entry["lr"] = learning_rate
        optimizer.step()
        return loss

    def evaluate(
        self, split: Split, batches: list[np.ndarray], precision: Precision, beat: Callable[[], None] = lambda: None
    ) -> tuple[float, float | None]:
        """Weighted mean loss, and the share of rows that are right (None when the job does not say), over all batches.

        Batch i goes to rank i modulo the number of ranks.
        """
        sums = np.zeros(4)
        self.model.eval()
        with torch.inference_mode(), computing_in(precision, self.group.device):
            for rows in batches[self.group.rank :: self.group.num_ranks]:
                weights = self.job.row_weights(split, rows)
                result = self.job.row_losses(self.model, self._batch(split, rows))
                loss = (result.loss.double() * self._as_tensor(weights, result.loss.double())).sum()
                right = math.nan if result.correct is None else float(result.correct.sum())
                sums += [float(loss), weights.sum(), right, len(rows)]
                beat()
        self.model.train()
        loss_sum, weight_sum, num_right, num_rows = self.group.sum(sums.tolist())
        return loss_sum / weight_sum, None if math.isnan(num_right) else num_right / num_rows

    def _batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.group.device) for name, tensor in self.job.batch(split, rows).items()}

    @staticmethod
    def _as_tensor(weights: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(weights).to(device=like.device, dtype=like.dtype)
