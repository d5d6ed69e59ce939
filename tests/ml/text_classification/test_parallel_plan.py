from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, RobertaConfig

from ml.errors import ConfigError
from ml.text_classification.model import build_classifier
from ml.text_classification.parallel_plan import cut_to_stage, parallel_plan
from ml.text_classification.settings import TextClassifierConfig
from ml.training.layout import check_layout
from ml.training.spec import Parallelism
from ml.training.strategies.pipeline import stage_of
from tests.tiny_encoders import write_tiny_bert, write_tiny_deepseek

SETTINGS = TextClassifierConfig(encoder="unused", dropout=0.0)


def write_tiny_roberta(folder: Path) -> Path:
    RobertaConfig(
        vocab_size=70, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=40
    ).save_pretrained(folder)
    return folder


def classifier(folder: Path):
    return build_classifier(folder, 3, SETTINGS, seed=0).eval()


@pytest.mark.parametrize("write", [write_tiny_bert, write_tiny_roberta])
def test_stages_one_after_the_other_are_the_classifier(write, tmp_path: Path) -> None:
    folder = write(tmp_path)
    ids = torch.randint(5, 60, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    ids, mask = ids.where(mask, 1 if write is write_tiny_roberta else 0), mask.long()
    whole = classifier(folder)
    found, names = ids, []
    for index in range(2):
        stage = cut_to_stage(classifier(folder), stage_of(index, 2, 2))
        names += stage.state_dict()
        found = stage(found, mask)
    torch.testing.assert_close(found, whole(ids, mask), atol=1e-6, rtol=1e-5)
    assert sorted(names) == sorted(whole.state_dict())


@pytest.mark.parametrize("write", [write_tiny_bert, write_tiny_roberta])
def test_the_plan_names_what_is_there(write, tmp_path: Path) -> None:
    folder = write(tmp_path)
    plan, model = parallel_plan(AutoConfig.from_pretrained(folder), pad_id=0), classifier(folder)
    for name in plan.blocks:
        model.get_submodule(name)
    split = {name.replace("*", str(index)) for name in plan.splits for index in range(2)}
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == split | {"head"}
    assert plan.max_length == (38 if write is write_tiny_roberta else 128)


def test_deepseek_can_be_sharded_and_says_why_no_more(tmp_path: Path) -> None:
    folder = write_tiny_deepseek(tmp_path, ["a good film", "a bad film"])
    plan, model = parallel_plan(AutoConfig.from_pretrained(folder), pad_id=2), classifier(folder)
    for name in plan.blocks:
        model.get_submodule(name)
    assert check_layout(Parallelism("fsdp"), 2, plan).shard == 2
    with pytest.raises(ConfigError, match=r"declares no tensor plan \(its latent attention .*\); fsdp works with 2 ranks"):
        check_layout(Parallelism("tensor"), 2, plan)


def test_an_encoder_without_a_plan_is_copied_only() -> None:
    config = AutoConfig.for_model("distilbert")
    with pytest.raises(ConfigError, match=r"tensor: .*none was written for distilbert encoders.*; ddp works with 2 ranks"):
        check_layout(Parallelism("tensor"), 2, parallel_plan(config, pad_id=0))
