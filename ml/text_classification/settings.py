"""The `model` section of a text-classification solution's config."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class TextClassifierConfig(BaseModel):
    """An encoder with a classification head. "auto" is decided once, from the encoder and the training texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = Field(description="Hugging Face folder, s3:// prefix, package:<import name>/<folder>, config:<folder>, or hub name")
    max_length: Annotated[int, Field(ge=4, le=8192)] | Literal["auto"] = Field(
        default="auto", description="tokens kept of a text; auto: covers 95 % of them, within max_length_cap"
    )
    max_length_cap: int = Field(default=128, ge=8, le=8192)
    pooling: Literal["auto", "mean", "last"] = Field(default="auto", description="auto: mean, or the last token for causal encoders")
    dropout: float = Field(default=0.1, ge=0, lt=1)
