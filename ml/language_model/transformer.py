"""A decoder-only transformer in plain torch (Vaswani et al. 2017), in the form that most language models now have.

RMSNorm before each part (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020), no biases.
Attention runs in whatever fused kernel torch has for the device.

Shapes: B batch, T tokens, D width, N heads, H size of a head (D / N), F inner size of the feed-forward part, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ml.errors import ConfigError
from ml.training.job import ParallelPlan, Stage

ROTARY_BASE = 10_000.0
INITIAL_SPREAD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer.

    Args:
        width: of a token's vector; a multiple of `num_heads`, with an even size of a head.
        hidden: inner size of the feed-forward part; about 8/3 of the width is usual with SwiGLU.
        max_length: the most tokens of a row.
        tied_head: the head is the token table. Saves the head's weights.
        dropout: on what attention and feed-forward part add.

    Raises:
        ConfigError: the width cannot be shared out over the heads.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    max_length: int
    tied_head: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % (2 * self.num_heads):
            raise ConfigError(f"width {self.width} with {self.num_heads} heads; give a multiple of {2 * self.num_heads}")

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


def num_parameters(config: TransformerConfig) -> int:
    """Without building the model."""
    block = 4 * config.width**2 + 3 * config.width * config.hidden + 2 * config.width
    tables = config.vocab_size * config.width * (1 if config.tied_head else 2)
    return config.num_layers * block + tables + config.width


def parallel_plan(config: TransformerConfig) -> ParallelPlan:
    """Queries, keys, values, gate and up by columns; what adds to the residual stream by rows. A tied head is in no pipeline.

    The batch's tensor is `input_ids`; a job adds its own tensors to `padding`.
    """
    return ParallelPlan(
        blocks=tuple(f"blocks.{index}" for index in range(config.num_layers)),
        splits={
            "blocks.*.attention.query": "columns",
            "blocks.*.attention.key": "columns",
            "blocks.*.attention.value": "columns",
            "blocks.*.attention.output": "rows",
            "blocks.*.feed_forward.gate": "columns",
            "blocks.*.feed_forward.up": "columns",
            "blocks.*.feed_forward.down": "rows",
        },
        tensor_sizes={"heads": config.num_heads, "inner units": config.hidden},
        make_stage=None if config.tied_head else cut_to_stage,
        stage_input="input_ids",
        padding={"input_ids": 0},
        max_length=config.max_length,
        no_pipeline="its head is the token table, which the first and the last stage would both need; set tied_head to false",
    )


def cut_to_stage(model: nn.Module, stage: Stage) -> nn.Module:
    """The same model without what other stages hold. It takes token ids in the first stage, hidden states in the others."""
    if not isinstance(model, Transformer):
        raise TypeError(f"a stage is cut from a Transformer, not from a {type(model).__name__}")
    for name in list(model.blocks):
        if int(name) not in stage.blocks:
            del model.blocks[name]
    if not stage.is_first:
        model.embedding = None
    if not stage.is_last:
        model.norm = model.head = None
    return model


class Transformer(nn.Module):
    """Token ids to logits; or one stage of that, see `cut_to_stage`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding: nn.Embedding | None = nn.Embedding(config.vocab_size, config.width)
        # Named by number, so that a stage's blocks keep their names.
        self.blocks = nn.ModuleDict({str(index): Block(config) for index in range(config.num_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.width)
        self.head: nn.Linear | None = nn.Linear(config.width, config.vocab_size, bias=False)
        self._draw_weights()
        if config.tied_head:
            self.head.weight = self.embedding.weight
        cosine_TH, sine_TH = rotary_tables(config.max_length, config.head_size)
        self.cosine_TH = nn.Buffer(cosine_TH, persistent=False)
        self.sine_TH = nn.Buffer(sine_TH, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) from `input_ids` (B, T) int64. What a token's logits are depends on it and those before it only."""
        x_BTD = input_ids if self.embedding is None else self.embedding(input_ids)
        length = x_BTD.shape[1]
        rotary = (self.cosine_TH[:length], self.sine_TH[:length])
        for block in self.blocks.values():
            x_BTD = block(x_BTD, *rotary)
        if self.norm is None or self.head is None:
            return x_BTD
        return self.head(self.norm(x_BTD))

    def _draw_weights(self) -> None:
        """Normal with a spread of 0.02; what adds to the residual stream smaller by the root of how often that happens.

        Radford et al. 2019, section 2.3.
        """
        residual_spread = INITIAL_SPREAD / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            adds = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            nn.init.normal_(parameter, std=residual_spread if adds else INITIAL_SPREAD)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor, cosine_TH: torch.Tensor, sine_TH: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), cosine_TH, sine_TH))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


class Attention(nn.Module):
    """Causal self-attention. The number of heads comes from the tensors: with split matrices a rank has some of them."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_size = config.head_size
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: torch.Tensor, cosine_TH: torch.Tensor, sine_TH: torch.Tensor) -> torch.Tensor:
        q_BNTH = rotate(self._heads(self.query(x_BTD)), cosine_TH, sine_TH)
        k_BNTH = rotate(self._heads(self.key(x_BTD)), cosine_TH, sine_TH)
        v_BNTH = self._heads(self.value(x_BTD))
        mixed_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        return self.output(mixed_BNTH.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.unflatten(2, (-1, self.head_size)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))


def rotary_tables(num_positions: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (positions, H) of the angles by which pairs of values turn, see `rotate` (Su et al. 2021, equation 34)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    angles_TH = torch.cat([angles, angles], dim=1)
    return angles_TH.cos().float(), angles_TH.sin().float()


def rotate(x_BNTH: torch.Tensor, cosine_TH: torch.Tensor, sine_TH: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (value i, value i + H/2) of each head by the angle of their position."""
    first, second = x_BNTH.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BNTH * cosine_TH.to(x_BNTH.dtype) + turned * sine_TH.to(x_BNTH.dtype)
