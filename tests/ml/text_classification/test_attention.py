"""Attention runs in torch's own kernel, which never holds the (heads, T, T) scores where the hardware lets it."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from ml.text_classification.model import build_classifier
from ml.text_classification.settings import TextClassifierConfig
from tests.tiny_encoders import write_tiny_bert, write_tiny_deepseek


def encoder_folder(kind: str, folder: Path) -> Path:
    return write_tiny_bert(folder) if kind == "bert" else write_tiny_deepseek(folder, ["a good film", "a bad film"])


@pytest.mark.parametrize("kind", ["bert", "deepseek"])
def test_encoders_call_scaled_dot_product_attention(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_classifier(encoder_folder(kind, tmp_path), 2, TextClassifierConfig(encoder="any"), seed=0)
    assert model.encoder.config._attn_implementation == "sdpa"
    calls = []
    kernel = functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        calls.append(arguments[0].shape)
        return kernel(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    ids = torch.randint(5, 30, (3, 7))
    model(ids, torch.ones_like(ids))
    assert len(calls) == model.encoder.config.num_hidden_layers
    assert all((shape[0], shape[-2]) == (3, 7) for shape in calls)
