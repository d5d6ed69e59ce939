"""The network itself. Importing this module imports torch; `ml.text_classification.model` builds, saves and loads it.

Shapes: B batch, T tokens, H hidden size of the encoder, C classes.
"""

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pooling = Literal["mean", "last"]


class TextClassifier(nn.Module):
    """An encoder, one vector per text, and a linear layer.

    Args:
        encoder: a transformers model whose output has `last_hidden_state` (B, T, H).
        hidden_size: H.
        num_labels: C.
        pooling: "mean" over the tokens of the text, or its "last" token (causal encoders: the only one that saw all).
        dropout: on the pooled vector.
    """

    def __init__(self, encoder: "PreTrainedModel", *, hidden_size: int, num_labels: int, pooling: Pooling, dropout: float):
        super().__init__()
        self.encoder: PreTrainedModel = encoder
        self.pooling: Pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, num_labels)

    @property
    def token_table(self) -> nn.Embedding:
        """The encoder's embedding of token ids, (vocabulary, H)."""
        return cast(nn.Embedding, self.encoder.get_input_embeddings())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) float32 from `input_ids` and `attention_mask`, both (B, T) int64, padded on the right.

        A row's logits do not depend on how far it is padded, nor on the other rows.
        """
        hidden_BTH = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled_BH = self._pool(hidden_BTH.float(), attention_mask)
        return self.head(self.dropout(pooled_BH)).float()

    def _pool(self, hidden_BTH: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # A text without any token counts as one of its padding tokens: zero tokens have no mean and no last.
        lengths_B = attention_mask.sum(dim=1).clamp(min=1)
        if self.pooling == "last":
            last_B11 = (lengths_B - 1)[:, None, None]
            return hidden_BTH.gather(1, last_B11.expand(-1, 1, hidden_BTH.shape[2])).squeeze(1)
        mask_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTH.dtype)
        return (hidden_BTH * mask_BT1).sum(dim=1) / lengths_B.unsqueeze(-1)


def dense_experts(experts: nn.Module, hidden_NH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Mixture of experts as two plain matrix products: every expert sees every token, the router's weight is zero for most.

    The same result as choosing the experts first, at (experts / chosen) times the arithmetic, but without data-dependent
    shapes: it exports to ONNX, INT8 quantization finds its weights, and every expert gets a gradient in every step.

        out = sum_e w_e D_e g(G_e x) = [D_1 ... D_E] [w_1 g(G_1 x); ...; w_E g(G_E x)]

    Shapes: N tokens, E experts, K chosen, I inner size; `top_k_index` and `top_k_weights` are (N, K). Registered with
    transformers as the experts implementation "dense" (signature: `transformers.integrations.moe.ExpertsInterface`).
    """
    gate_up_E2IH: torch.Tensor = experts.gate_up_proj  # type: ignore[assignment]
    down_EHI: torch.Tensor = experts.down_proj  # type: ignore[assignment]
    num_experts, hidden_size, inner = down_EHI.shape
    weights_NE = torch.zeros(hidden_NH.shape[0], num_experts, dtype=top_k_weights.dtype, device=hidden_NH.device)
    weights_NE = weights_NE.scatter(1, top_k_index, top_k_weights)
    gate_up = nn.functional.linear(hidden_NH, gate_up_E2IH.reshape(num_experts * 2 * inner, hidden_size))
    gate_up_NE2I = gate_up.reshape(-1, num_experts, 2 * inner)
    inner_NEI = experts._apply_gate(gate_up_NE2I)  # type: ignore[operator]
    weighted = (inner_NEI * weights_NE.unsqueeze(-1)).reshape(-1, num_experts * inner)
    down = down_EHI.permute(1, 0, 2).reshape(hidden_size, num_experts * inner)
    return nn.functional.linear(weighted.to(hidden_NH.dtype), down).to(hidden_NH.dtype)
