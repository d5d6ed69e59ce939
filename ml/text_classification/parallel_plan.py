"""How a text classifier can be split over ranks, by the kind of its encoder. Importing this module imports torch.

Shapes: B batch, T tokens, H hidden size of the encoder, C classes.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ml.text_classification.network import TextClassifier
from ml.training.job import ParallelPlan, Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Encoders whose layers are named and put together as BERT's.
LIKE_BERT = ("bert", "roberta", "xlm-roberta")
# RoBERTa counts positions from padding_idx + 1.
RESERVED_POSITIONS = {"roberta": 2, "xlm-roberta": 2}


def parallel_plan(config: "PretrainedConfig", pad_id: int) -> ParallelPlan:
    """The plan of a `TextClassifier` with this encoder; an empty one for encoders that nobody has written a plan for."""
    if config.model_type in LIKE_BERT:
        return _plan_like_bert(config, pad_id)
    if config.model_type == "deepseek_v3":
        return ParallelPlan(
            blocks=tuple(f"encoder.layers.{index}" for index in range(config.num_hidden_layers)),
            no_tensor="its latent attention shares one compressed key and value among all heads, and its experts are no linear layers",
            no_pipeline="none was written for its mixture of experts",
        )
    missing = f"none was written for {config.model_type} encoders"
    return ParallelPlan(no_tensor=missing, no_pipeline=missing)


def _plan_like_bert(config: "PretrainedConfig", pad_id: int) -> ParallelPlan:
    return ParallelPlan(
        blocks=tuple(f"encoder.encoder.layer.{index}" for index in range(config.num_hidden_layers)),
        splits={
            "encoder.encoder.layer.*.attention.self.query": "columns",
            "encoder.encoder.layer.*.attention.self.key": "columns",
            "encoder.encoder.layer.*.attention.self.value": "columns",
            "encoder.encoder.layer.*.attention.output.dense": "rows",
            "encoder.encoder.layer.*.intermediate.dense": "columns",
            "encoder.encoder.layer.*.output.dense": "rows",
        },
        tensor_sizes={"heads": config.num_attention_heads, "inner units": config.intermediate_size},
        make_stage=cut_to_stage,
        stage_input="input_ids",
        stage_context=("attention_mask",),
        padding={"input_ids": pad_id, "attention_mask": 0},
        max_length=config.max_position_embeddings - RESERVED_POSITIONS.get(config.model_type, 0),
    )


def cut_to_stage(model: nn.Module, stage: Stage) -> nn.Module:
    """A stage of a classifier with an encoder like BERT. What other stages hold is taken out of the classifier itself."""
    return ClassifierStage(cast(TextClassifier, model), stage)


class ClassifierStage(TextClassifier):
    """Some layers of an encoder like BERT, with the embeddings before the first and the head behind the last."""

    def __init__(self, classifier: TextClassifier, stage: Stage):
        head = classifier.head
        super().__init__(
            classifier.encoder,
            hidden_size=head.in_features,
            num_labels=head.out_features,
            pooling=classifier.pooling,
            dropout=classifier.dropout.p,
        )
        self._stage = stage
        self._layers = [f"encoder.encoder.layer.{index}" for index in stage.blocks]
        layers = cast(nn.ModuleList, classifier.get_submodule("encoder.encoder.layer"))
        for index in range(len(layers)):
            if index not in stage.blocks:
                layers[index] = nn.Identity()
        if not stage.is_first:
            self.encoder.embeddings = nn.Identity()
        self.head = head if stage.is_last else nn.Identity()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, H), or logits (B, C) from the last stage.

        Args:
            input_ids: (B, T) in the first stage; in the others, hidden states.
        """
        from transformers.masking_utils import create_bidirectional_mask

        hidden_BTH = self.get_submodule("encoder.embeddings")(input_ids)
        mask = create_bidirectional_mask(config=self.encoder.config, inputs_embeds=hidden_BTH, attention_mask=attention_mask)
        for name in self._layers:
            hidden_BTH = self.get_submodule(name)(hidden_BTH, mask)
        if not self._stage.is_last:
            return hidden_BTH
        return self.head(self.dropout(self._pool(hidden_BTH.float(), attention_mask))).float()
