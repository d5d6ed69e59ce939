"""A question in, the nearest answers out. The index of answers is a side file of the bundle."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ml.bundles import Bundle

VOCABULARY_FILE = "vocabulary.json"
INDEX_FILE = "index.safetensors"
UNKNOWN_ID = 1  # 0 pads

INPUT_SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1, "description": "the question"}},
    "required": ["text"],
    "additionalProperties": False,
}


def output_schema(answers: Sequence[str], num_answers: int) -> dict:
    answer = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(answers)}, "similarity": {"type": "number", "minimum": -1, "maximum": 1}},
        "required": ["answer", "similarity"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"answers": {"type": "array", "items": answer, "minItems": num_answers, "maxItems": num_answers}},
        "required": ["answers"],
        "additionalProperties": False,
    }


def tokenize(text: str) -> list[str]:
    return text.lower().split()


class RetrieverCodec:
    """Looks words up, and ranks answers by the inner product of their vectors with the question's.

    Args:
        index: (answers, width) float32, rows of length 1.
    """

    def __init__(self, vocabulary: dict[str, int], answers: Sequence[str], index: np.ndarray, max_length: int, num_answers: int):
        self.vocabulary = vocabulary
        self.answers = tuple(answers)
        self.index = index
        self.max_length = max_length
        self.num_answers = num_answers

    def encode(self, requests: Sequence[dict]) -> dict[str, np.ndarray]:
        rows = [
            [self.vocabulary.get(word, UNKNOWN_ID) for word in tokenize(request["text"])[: self.max_length]] or [UNKNOWN_ID]
            for request in requests
        ]
        shape = (len(rows), max(map(len, rows), default=1))
        input_ids, attention_mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = row
            attention_mask[number, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def similarities(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """(batch, answers) cosines."""
        return np.clip(outputs["embedding"] @ self.index.T, -1, 1)

    def decode(self, requests: Sequence[dict], outputs: dict[str, np.ndarray]) -> list[dict]:
        replies = []
        for row in self.similarities(outputs):
            best = np.argsort(-row, kind="stable")[: self.num_answers]
            replies.append({"answers": [{"answer": self.answers[index], "similarity": float(row[index])} for index in best]})
        return replies


def load_codec(bundle: Bundle, folder: Path) -> RetrieverCodec:
    options = bundle.options
    vocabulary = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
    index = load_file(folder / INDEX_FILE)["index"]
    return RetrieverCodec(vocabulary, options["answers"], index, options["max_length"], options["num_answers"])
