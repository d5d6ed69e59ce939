"""One optimizer step and one validation, shared out over the ranks so that their number changes nothing but the time."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ml.errors import TrainingError
from ml.training.batches import share_of_rank
from ml.training.job import Split, TrainingJob, plan_of
from ml.training.layout import Layout, check_layout, choose_strategy
from ml.training.optimizers import build_optimizer
from ml.training.precision import LossScaler, Precision
from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync, Parallelism, TrainSpec
from ml.training.strategies import build_strategy
from ml.training.strategies.base import Pass, Passed, as_tensor
from ml.training.strategies.sizes import device_bytes, model_sizes


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        loss: weighted mean over the global batch, the same in every rank.
        gradient_norm: before clipping, the same in every rank.
        finite: loss and gradient are; otherwise no weight was changed.
        overflowed: only because fp16 could not hold the scaled gradient; the scale is now smaller, and nothing is wrong with the batch.
        poisoned_rows: of the global batch, those whose own loss is not finite.
        asked_to_stop: some rank was.
        num_rows, num_tokens: of this rank. Ranks that compute the same rows together all say them; `Layout.counts` tells whose to add.
        data_seconds: this rank waited for its batch.
        forward_seconds: of this rank alone, no waiting for others in it (but in a pipeline and with split matrices).
        backward_seconds: what of the communication is not hidden behind it is in it. A pipeline's is in `forward_seconds`.
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
    overflowed: bool = False
    poisoned_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Validation:
    """Over all rows of a split: weighted mean loss and, of a classifier, the share of rows that are right and the macro recall."""

    loss: float
    accuracy: float | None = None
    recall: float | None = None


class Stepper:
    """This rank's part of a model, and how it is stepped and validated together with the other ranks'.

    The gradient is that of the weighted mean loss over the global batch: each data rank adds up its rows' weighted losses,
    divides by the weight of the *global* batch, and multiplies by the number of data ranks, which averaging takes out again.
    So data ranks may have unequal shares.

    Attributes:
        parallelism: as used; where the spec says "auto", what was chosen. Keep it when a training is resumed.
        choice: why, in words; empty where the spec says the strategy.
        load_batch: makes the tensors of rows of a split; a prefetcher may take its place. See `passes`.

    Raises:
        ConfigError: the model cannot be split as the spec says.
        TrainingError: the job did not build the same model in all ranks.
    """

    def __init__(self, spec: TrainSpec, job: TrainingJob, group: RankGroup, parallelism: Parallelism | None = None):
        self.spec = spec
        self.job = job
        self.group = group
        self.load_batch: Callable[[Split, np.ndarray], dict[str, torch.Tensor]] = job.batch
        self.parallelism = spec.parallelism if parallelism is None else parallelism
        self.choice = ""
        layout = None if self.parallelism.strategy == "auto" else self._checked_layout()
        model = job.build_model(spec.seed)
        model.train()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        _check_same_in_all_ranks(model, group)
        if layout is None:
            self.parallelism, self.choice = self._chosen(model)
            layout = self._checked_layout()
        self.layout: Layout = layout
        self.strategy = build_strategy(layout, spec, job, model, group)
        self.model: nn.Module = self.strategy.model
        self.parameters = self.strategy.parameters
        self.data_rank = layout.data_rank(group.rank)
        self._scalers: dict[Precision, LossScaler] = {}
        # Ranks that compute the same rows must drop the same values.
        stage = layout.coordinate(group.rank, "pipeline")
        torch.manual_seed(spec.seed * 1_000_003 + stage * layout.num_data_ranks + self.data_rank)

    @property
    def is_bucketed(self) -> bool:
        """Whether gradients travel in DDP's buckets, see `rewrap`."""
        return self.strategy.is_bucketed

    def rewrap(self, sync: GradientSync) -> None:
        """Lay DDP's buckets out anew; nothing in other strategies. All ranks call it, between two steps."""
        self.strategy.rewrap(sync)

    def new_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        settings = replace(self.spec.optimizer, learning_rate=learning_rate)
        return build_optimizer(self.model.named_parameters(), settings, self.group.device)

    def scaler(self, precision: Precision) -> LossScaler:
        """The loss scaler of a precision; it has state in fp16 only."""
        if precision not in self._scalers:
            self._scalers[precision] = LossScaler(precision, self.group.device)
        return self._scalers[precision]

    def passes(self, rows: np.ndarray, shares: Sequence[int] | None = None) -> list[tuple[np.ndarray, int]]:
        """The rows that this rank loads for a global batch, one array for each pass, and how many of each count.

        Every rank has the same number of passes; one for which nothing is left is a single row that counts nothing.

        Args:
            shares: rows of each data rank, in order, see `batches.share_of_rank`; equal when not given.
        """
        share, num_counting = share_of_rank(rows, self.data_rank, self.layout.num_data_ranks, None if shares is None else list(shares))
        num_passes = self.spec.gradient_sync.accumulation_steps
        if num_passes == 1:
            return [(share, num_counting)]
        parts = [share[:num_counting][index::num_passes] for index in range(num_passes)]
        return [(part, len(part)) if len(part) else (share[:1], 0) for part in parts]

    def train_step(
        self,
        rows: np.ndarray,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        learning_rate: float,
        *,
        shares: Sequence[int] | None = None,
        ask_to_stop: bool = False,
    ) -> StepResult:
        """One step on a global batch. Where loss or gradient are not finite, no rank changes a weight.

        Args:
            shares: rows of each data rank; `rows` is then in their order.
        """
        started = time.perf_counter()
        parts = self.passes(rows, shares)
        # A batch in which nothing counts has loss 0 and gradient 0.
        total_weight = float(self.job.row_weights("train", rows).sum()) or 1.0
        passes = [self._pass("train", part, num_counting) for part, num_counting in parts]
        loaded = time.perf_counter()
        scaler = self.scaler(precision)
        factor = float(scaler.scale(torch.ones((), device=self.group.device)))
        optimizer.zero_grad(set_to_none=True)
        passed = self.strategy.forward_backward(passes, factor * self.layout.num_data_ranks / total_weight, precision)
        backward_done = time.perf_counter()
        scaler.unscale_(optimizer)
        # One number of all ranks: a gradient that is not finite in one of them is not finite in any.
        norm = self.strategy.gradient_norm()
        loss_sum, num_asked = self.group.sum([passed.weighted_loss, float(ask_to_stop)])
        loss = loss_sum / total_weight
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.strategy.clip_gradients(norm, self.spec.optimizer.gradient_clip)
            for entry in optimizer.param_groups:
                entry["lr"] = learning_rate
            optimizer.step()
        scaler.update(math.isfinite(norm))
        counting = np.concatenate([part[:num_counting] for part, num_counting in parts])
        return StepResult(
            loss=loss,
            gradient_norm=norm,
            finite=finite,
            asked_to_stop=num_asked > 0,
            num_rows=len(counting),
            num_tokens=int(self.job.lengths["train"][counting].sum()),
            data_seconds=loaded - started,
            forward_seconds=passed.forward_seconds,
            backward_seconds=passed.backward_seconds,
            update_seconds=time.perf_counter() - backward_done,
            overflowed=precision == "fp16" and math.isfinite(loss) and not math.isfinite(norm),
            poisoned_rows=() if finite else self._poisoned_rows(rows, parts, passed),
        )

    def evaluate(
        self, split: Split, batches: list[np.ndarray], precision: Precision, beat: Callable[[], None] = lambda: None
    ) -> Validation:
        """Loss, accuracy and macro recall over all batches. Batch i goes to data rank i modulo their number.

        A data rank for which no batch is left computes the first one once more and does not count it, for ranks that hold parts
        of the model need each other for every batch.
        """
        loss_sum = weight_sum = 0.0
        hits: dict[int, int] = {}
        totals: dict[int, int] = {}
        self.model.eval()
        num_data_ranks = self.layout.num_data_ranks
        for start in range(0, len(batches), num_data_ranks):
            mine = start + self.data_rank
            rows = batches[mine] if mine < len(batches) else batches[0]
            result = self.strategy.row_losses(self._pass(split, rows, len(rows)).batch, precision)
            beat()
            if result is None or mine >= len(batches) or not self.layout.counts(self.group.rank):
                continue
            weights = self.job.row_weights(split, rows)
            losses = result.loss.double()
            loss_sum += float((losses * as_tensor(weights, losses)).sum())
            weight_sum += float(weights.sum())
            if result.predicted is not None and result.target is not None:
                for target, predicted in zip(result.target.tolist(), result.predicted.tolist(), strict=True):
                    totals[target] = totals.get(target, 0) + 1
                    hits[target] = hits.get(target, 0) + int(target == predicted)
        self.model.train()
        return self._validation(loss_sum, weight_sum, hits, totals)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's parameters and persistent buffers on the CPU, in the first rank; nothing in the others. All call it."""
        return self.strategy.whole_weights()

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole model's weights, given in every rank.

        Raises:
            TrainingError: they are of another model.
        """
        self.strategy.load_whole_weights(weights)

    def state_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """This rank's part of model and optimizer for torch.distributed.checkpoint, to save or to load into.

        "model/<name>" and "optimizer/<name>/<key>", with the names of the whole model: any layout reads what any other wrote.
        """
        return self.strategy.state_tensors(optimizer)

    def restore(self, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        """Take this rank's part of whole tensors, named as those of `state_tensors` and given in every rank.

        Raises:
            TrainingError: they are of another model or optimizer.
        """
        self.strategy.restore(optimizer, tensors)

    def _poisoned_rows(self, rows: np.ndarray, parts: list[tuple[np.ndarray, int]], passed: Passed) -> tuple[int, ...]:
        """All ranks call it."""
        bad = np.zeros(len(rows))
        for (part, num_counting), losses in zip(parts, passed.row_losses, strict=bool(passed.row_losses)):
            is_bad = ~torch.isfinite(losses[:num_counting]).cpu().numpy()
            bad[np.isin(rows, part[:num_counting][is_bad])] = 1.0
        return tuple(int(row) for row, count in zip(rows, self.group.sum(bad.tolist()), strict=True) if count)

    def _checked_layout(self) -> Layout:
        return check_layout(self.parallelism, self.group.num_ranks, plan_of(self.job), self.spec.gradient_sync)

    def _chosen(self, model: nn.Module) -> tuple[Parallelism, str]:
        """What "auto" comes to: the same in all ranks, though one may have less free memory than another."""
        ranks_per_node = max(self.group.num_ranks // self.spec.nodes.count, 1)
        plan = plan_of(self.job)
        num_tokens = self.spec.batch_size_per_rank * int(self.job.lengths["train"].max())
        return choose_strategy(
            model_sizes(model, plan, self.spec.optimizer, num_tokens),
            plan,
            self.parallelism,
            num_ranks=self.group.num_ranks,
            ranks_per_node=ranks_per_node,
            device_bytes=int(-self.group.largest(-float(device_bytes(self.group.device, ranks_per_node)))),
            gradient_sync=self.spec.gradient_sync,
        )

    def _pass(self, split: Split, rows: np.ndarray, num_counting: int) -> Pass:
        weights = self.job.row_weights(split, rows)
        weights[num_counting:] = 0.0
        return Pass(
            {name: tensor.to(self.group.device, non_blocking=True) for name, tensor in self.load_batch(split, rows).items()}, weights
        )

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


def _check_same_in_all_ranks(model: nn.Module, group: RankGroup) -> None:
    """A job that builds another model in another rank would train something that is neither."""
    if group.num_ranks == 1:
        return
    total = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    largest, smallest = group.largest(total), -group.largest(-total)
    if largest != smallest:
        raise TrainingError(
            f"the job built different models in different ranks (sums of weights from {smallest} to {largest}); "
            "build_model must depend on its seed alone"
        )
