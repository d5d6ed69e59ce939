"""The cases: each strategy with each model, exact and single, plain and accumulated, with both optimizers."""

from dataclasses import replace

from ml.training.spec import GradientSync, Optimizer
from tests.ml.training.strategies.cases import Case

SGD = Optimizer("sgd", learning_rate=0.1, momentum=0.9, gradient_clip=0.5)
LANGUAGE_MODEL, TOY, TEXT = "TinyLanguageModelJob", "ToyJobWithBlocks", "ml.text_classification.training_job:TextClassificationJob"
ACCUMULATED = GradientSync(bucket_mb=0.001, accumulation_steps=2)
GPIPE = {"pipeline_schedule": "gpipe"}
WEIGHTED = {"weights": (1.0, 3.0)}


def cases(strategies: list[str], hybrids: bool) -> list[Case]:
    """Each strategy with each model, exact and single, plain and accumulated, AdamW and SGD, equal and unequal shares."""
    found: list[Case] = []
    for strategy in strategies:
        exact = Case(f"lm-{strategy}-exact", LANGUAGE_MODEL, strategy, {"double": True}, SGD, ACCUMULATED)
        found += [exact, Case(f"lm-{strategy}", LANGUAGE_MODEL, strategy), Case(f"text-{strategy}", TEXT, strategy, {}, SGD, ACCUMULATED)]
        if strategy in ("ddp", "fsdp"):
            shares = {0: (5, 2), 1: (0, 5), 3: (4, 6)}
            found.append(Case(f"toy-{strategy}-exact", TOY, strategy, {"double": True} | WEIGHTED, shares=shares))
            found.append(Case(f"toy-{strategy}", TOY, strategy, WEIGHTED, SGD, ACCUMULATED))
        if "pipeline" in strategy:
            found.append(replace(exact, name=f"lm-{strategy}-gpipe", parallelism=GPIPE, sync=GradientSync()))
    if not hybrids:
        after = GradientSync(bucket_mb=0.001, overlap=False)
        found += [Case(f"moe-{strategy}", TEXT, strategy, {}, SGD, ACCUMULATED, subfolder="moe") for strategy in ("ddp", "fsdp")]
        found.append(Case("lm-ddp-after", LANGUAGE_MODEL, "ddp", {"double": True}, SGD, after))
        found.append(Case("lm-fsdp-tied", LANGUAGE_MODEL, "fsdp", {"double": True, "tied_head": True}, SGD))
        found.append(Case("lm-tensor-tied", LANGUAGE_MODEL, "tensor", {"double": True, "tied_head": True}, SGD))
    return found


IN_TWO = cases(["ddp", "fsdp", "tensor", "pipeline"], hybrids=False)
IN_FOUR = [
    *cases(["ddp+tensor", "fsdp+tensor", "ddp+pipeline"], hybrids=True),
    Case("lm-tensor-four", LANGUAGE_MODEL, "tensor"),
    Case("lm-fsdp-four", LANGUAGE_MODEL, "fsdp"),
]
