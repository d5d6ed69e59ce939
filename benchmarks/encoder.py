"""A text classifier of the size of MiniLM and texts of random tokens, for benchmarks: torch and numpy, nothing of ours.

Shapes: B batch, T tokens, D width, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

VOCABULARY = 8192
NUM_CLASSES = 2
PAD = 0
# Lengths of short reviews: log-normal, median 26 tokens, a tail up to the limit.
MEDIAN_LENGTH, SPREAD, MAX_LENGTH = 26.0, 0.6, 128


@dataclass(frozen=True)
class Texts:
    """Token ids of all rows, one after the other, `offsets` (N + 1,), and `targets` (N,)."""

    ids: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_ids` (B, T) padded on the right, `is_padding` (B, T) bool, `targets` (B,)."""
        lengths = self.lengths[rows]
        input_ids = np.full((len(rows), int(lengths.max())), PAD, dtype=np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : lengths[index]] = self.ids[self.offsets[row] : self.offsets[row + 1]]
        is_padding = np.arange(input_ids.shape[1]) >= lengths[:, None]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "is_padding": torch.from_numpy(is_padding),
            "targets": torch.from_numpy(self.targets[rows]),
        }


def random_texts(num_rows: int, seed: int) -> Texts:
    """Class 1 has more tokens of the upper half of the vocabulary, so that there is something to learn."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(MEDIAN_LENGTH), SPREAD, num_rows), 4, MAX_LENGTH).astype(np.int64)
    targets = random.integers(0, NUM_CLASSES, num_rows)
    ids = random.integers(1, VOCABULARY // 2, int(lengths.sum()))
    ids += np.repeat(targets, lengths) * (random.random(len(ids)) < 0.3) * (VOCABULARY // 2)
    return Texts(ids.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]), targets)


class EncoderClassifier(nn.Module):
    """Embedding, transformer encoder, mean over the tokens, a linear layer."""

    def __init__(self, width: int = 384, num_layers: int = 6, num_heads: int = 12, dropout: float = 0.1):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(MAX_LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, input_ids: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
        """Logits (B, C)."""
        x_BTD = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        x_BTD = self.encoder(x_BTD, src_key_padding_mask=is_padding)
        kept_BT1 = (~is_padding).unsqueeze(-1).to(x_BTD.dtype)
        return self.head((x_BTD * kept_BT1).sum(1) / kept_BT1.sum(1)).float()


def build_encoder(seed: int, **sizes) -> EncoderClassifier:
    torch.manual_seed(seed)
    return EncoderClassifier(**sizes)
