"""Text in, class and probabilities out. Needs only `tokenizers` and NumPy, so a serving process stays small."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ml.bundles import Bundle

TOKENIZER_FILE = "tokenizer.json"

INPUT_SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1, "maxLength": 100_000, "description": "the text to classify"}},
    "required": ["text"],
    "additionalProperties": False,
}


def output_schema(labels: Sequence[str]) -> dict:
    """JSON Schema of one reply: the most probable class, its probability, and all probabilities."""
    return {
        "type": "object",
        "properties": {
            "label": {"type": "string", "enum": list(labels)},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
            "probabilities": {
                "type": "object",
                "properties": {label: {"type": "number", "minimum": 0, "maximum": 1} for label in labels},
                "required": list(labels),
                "additionalProperties": False,
            },
        },
        "required": ["label", "probability", "probabilities"],
        "additionalProperties": False,
    }


class TextClassifierCodec:
    """Tokenizes requests and turns logits into replies.

    Bundle options read: `labels` (class names in order), `max_length` (tokens, longer texts are cut),
    `pad_id` (token id used to pad).
    """

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], max_length: int, pad_id: int):
        tokenizer.enable_truncation(max_length)
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.pad_id = pad_id

    def encode(self, requests: Sequence[dict]) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask`, both (batch, longest) int64, padded on the right."""
        encodings = self.tokenizer.encode_batch([request["text"] for request in requests])
        longest = max((len(encoding.ids) for encoding in encodings), default=1) or 1
        input_ids = np.full((len(encodings), longest), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros((len(encodings), longest), dtype=np.int64)
        for row, encoding in enumerate(encodings):
            input_ids[row, : len(encoding.ids)] = encoding.ids
            attention_mask[row, : len(encoding.ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def probabilities(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """Softmax of `logits` (batch, classes), in float64."""
        logits = outputs["logits"].astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def decode(self, requests: Sequence[dict], outputs: dict[str, np.ndarray]) -> list[dict]:
        replies = []
        for row in self.probabilities(outputs):
            best = int(row.argmax())
            replies.append(
                {
                    "label": self.labels[best],
                    "probability": float(row[best]),
                    "probabilities": dict(zip(self.labels, map(float, row), strict=True)),
                }
            )
        return replies


def load_codec(bundle: Bundle, folder: Path) -> TextClassifierCodec:
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    options = bundle.options
    return TextClassifierCodec(tokenizer, options["labels"], options["max_length"], options["pad_id"])
