"""Trains in closed form: questions are pulled towards the vector of their answer by ridge regression."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ml.bundles import Bundle, GraphSpec, TensorSpec, write_bundle
from ml.solution import TrainContext, TrainResult

from .codec import INDEX_FILE, INPUT_SCHEMA, UNKNOWN_ID, VOCABULARY_FILE, RetrieverCodec, output_schema, tokenize

WEIGHTS_FILE = "model.safetensors"
GRAPH_NAME = "question_encoder"
RIDGE = 0.1
MAX_LENGTH = 64


class RetrieverConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    embedding_size: int = Field(default=32, ge=2)
    num_answers: int = Field(default=2, ge=1)


def train_retriever(context: TrainContext) -> TrainResult:
    import pandas as pd
    from safetensors.numpy import save_file

    settings = RetrieverConfig.model_validate(context.model)
    table = pd.read_parquet(context.train_table)
    random = np.random.default_rng(context.seed)
    words = Counter(word for text in table["text"] for word in tokenize(text))
    vocabulary = {word: number for number, word in enumerate(sorted(words), start=UNKNOWN_ID + 1)}
    embedding = random.normal(size=(len(vocabulary) + 2, settings.embedding_size)).astype(np.float32)
    index = random.normal(size=(len(context.splits.labels), settings.embedding_size)).astype(np.float32)
    index /= np.linalg.norm(index, axis=1, keepdims=True)

    codec = RetrieverCodec(vocabulary, context.splits.labels, index, MAX_LENGTH, 1)
    encoded = codec.encode([{"text": text} for text in table["text"]])
    mask = encoded["attention_mask"][:, :, None]
    pooled = (embedding[encoded["input_ids"]] * mask).sum(axis=1) / mask.sum(axis=1)
    targets = index[table["target"].to_numpy()]
    square = pooled.T @ pooled + RIDGE * np.eye(settings.embedding_size, dtype=np.float32)
    projection = np.linalg.solve(square, pooled.T @ targets).astype(np.float32)

    folder = context.output_dir
    weights = {"embedding.weight": embedding, "projection.weight": np.ascontiguousarray(projection.T)}
    save_file(weights, folder / WEIGHTS_FILE)
    save_file({"index": index}, folder / INDEX_FILE)
    (folder / VOCABULARY_FILE).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    num_answers = min(settings.num_answers, len(context.splits.labels))
    write_bundle(
        folder,
        Bundle(
            solution="retriever",
            runtime="torch",
            graphs={GRAPH_NAME: graph_spec(WEIGHTS_FILE, settings.embedding_size)},
            side_files=(INDEX_FILE, VOCABULARY_FILE),
            options={"answers": list(context.splits.labels), "max_length": MAX_LENGTH, "num_answers": num_answers},
            input_schema=INPUT_SCHEMA,
            output_schema=output_schema(context.splits.labels, num_answers),
        ),
    )
    history_path = context.work_dir / "history.jsonl"
    history_path.write_text(json.dumps({"kind": "event", "message": "solved in closed form"}) + "\n", encoding="utf-8")
    return TrainResult(
        history_path=history_path,
        num_parameters=embedding.size + projection.size,
        num_train_rows=len(table),
        num_steps=1,
        best_step=1,
        resumed_from_step=0,
        num_recomputed_steps=0,
        plan={},
    )


def graph_spec(file: str, width: int) -> GraphSpec:
    return GraphSpec(
        file=file,
        inputs=tuple(TensorSpec(name=name, dtype="int64", shape=("batch", "length")) for name in ("input_ids", "attention_mask")),
        outputs=(TensorSpec(name="embedding", dtype="float32", shape=("batch", width)),),
    )


def build_module(bundle: Bundle, folder: Path, graph_name: str):
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / bundle.graphs[graph_name].file)

    class QuestionEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(*weights["embedding.weight"].shape)
            self.projection = torch.nn.Linear(*reversed(weights["projection.weight"].shape), bias=False)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            mask = attention_mask[:, :, None].float()
            pooled = (self.embedding(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)
            return torch.nn.functional.normalize(self.projection(pooled), dim=1)

    module = QuestionEncoder()
    module.load_state_dict(weights)
    return module.eval()
