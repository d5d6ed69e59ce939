from dataclasses import replace

import pytest
import torch
from torch import nn

from ml.errors import ConfigError
from ml.language_model.transformer import Transformer, TransformerConfig, cut_to_stage, num_parameters, parallel_plan, rotary_tables, rotate
from ml.training.strategies.pipeline import stage_of

CONFIG = TransformerConfig(vocab_size=50, width=32, num_layers=3, num_heads=4, hidden=48, max_length=24)


def built(config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).eval()


@pytest.mark.parametrize("tied_head", [False, True])
def test_parameters_are_counted_without_building(tied_head: bool) -> None:
    config = replace(CONFIG, tied_head=tied_head)
    assert num_parameters(config) == sum(parameter.numel() for parameter in built(config).parameters())


def test_a_token_sees_only_those_before_it() -> None:
    model = built()
    ids = torch.randint(0, 50, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    logits, others = model(ids), model(changed)
    assert logits.shape == (2, 12, 50)
    torch.testing.assert_close(logits[:, :7], others[:, :7])
    assert not torch.allclose(logits[:, 7:], others[:, 7:], atol=1e-4)
    torch.testing.assert_close(model(ids[:, :5]), logits[:, :5])


def test_rotated_products_depend_on_the_distance_only() -> None:
    cosine, sine = rotary_tables(30, 8)
    query, key = torch.randn(8), torch.randn(8)
    queries, keys = (rotate(x.expand(1, 1, 30, 8), cosine, sine)[0, 0] for x in (query, key))
    products = queries @ keys.T
    torch.testing.assert_close(products[5, 2], products[25, 22], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(30), atol=1e-5, rtol=1e-4)
    assert abs(float(products[5, 2] - products[5, 4])) > 1e-3


def test_stages_one_after_the_other_are_the_model() -> None:
    ids = torch.randint(0, 50, (2, 10))
    whole = built()
    hidden: torch.Tensor = ids
    names: list[str] = []
    for index in range(2):
        stage = cut_to_stage(built(), stage_of(index, 2, CONFIG.num_layers))
        names += stage.state_dict()
        hidden = stage(hidden)
    torch.testing.assert_close(hidden, whole(ids))
    assert sorted(names) == sorted(whole.state_dict())


def test_a_batch_is_learned_by_heart() -> None:
    model = built().train()
    ids = torch.randint(0, 50, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_the_plan_names_what_is_there() -> None:
    plan = parallel_plan(CONFIG)
    model = built()
    for block in plan.blocks:
        model.get_submodule(block)
    for name in plan.splits:
        assert isinstance(model.get_submodule(name.replace("*", "1")), nn.Linear)
    split = {name.replace("*", str(index)) for name in plan.splits for index in range(3)}
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == split | {"head"}


def test_a_tied_head_is_in_no_pipeline() -> None:
    plan = parallel_plan(replace(CONFIG, tied_head=True))
    assert plan.make_stage is None
    assert "tied_head" in plan.no_pipeline


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        replace(CONFIG, width=36)
