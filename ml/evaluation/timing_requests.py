"""Which requests a model is timed with: some of one exact length, and a mixture as they come."""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ml.config import EvaluateConfig
from ml.errors import DataError
from ml.solution import Codec

logger = logging.getLogger(__name__)

# Where a tokenizer merges characters into words, a prefix a little longer has the length that this one lacks.
_SEARCH_CHARACTERS = 60
_CHARACTERS_PER_TOKEN = 40


@dataclass(frozen=True)
class TimingRequests:
    """`batch`: requests of one length, for batch 1 in turn and for throughput together. `mixed`: for memory.

    `length_tokens` is the length of each request in `batch`; None where requests have no length in tokens.
    """

    batch: tuple[dict, ...]
    mixed: tuple[dict, ...]
    length_tokens: int | None


def choose_requests(codec: Codec, requests: Sequence[dict], config: EvaluateConfig) -> TimingRequests:
    """Requests for timing, made of real ones.

    Where a request is a text that the codec turns into `input_ids` (batch, length), texts are joined and cut until they
    have exactly `config.latency_length_tokens` tokens, or as many as the codec keeps. Others are taken as they are.

    Raises:
        DataError: there are no requests.
    """
    if not requests:
        raise DataError("there are no requests to time with; the validation split is empty")
    size = config.throughput_batch_size
    mixed = _mixture(requests, config.memory_requests)
    if not _has_length(codec, requests[0]):
        return TimingRequests(tuple(requests[index % len(requests)] for index in range(size)), mixed, None)
    texts = [request["text"] for request in requests]
    wanted_characters = config.latency_length_tokens * _CHARACTERS_PER_TOKEN
    length = min(config.latency_length_tokens, _num_tokens(codec, requests[0], _join_from(texts, 0, wanted_characters)))
    stride = max(1, len(texts) // size)
    batch = []
    for index in range(size):
        text = _join_from(texts, index * stride, wanted_characters)
        batch.append(requests[0] | {"text": _cut(codec, requests[0], text, length)})
    return TimingRequests(tuple(batch), mixed, length)


def _mixture(requests: Sequence[dict], size: int) -> tuple[dict, ...]:
    """Requests of all lengths, from shortest to longest, in a fixed random order."""
    ordered = sorted(requests, key=lambda request: len(json.dumps(request)))
    chosen = [ordered[index * len(ordered) // size] for index in range(size)]
    random.Random(0).shuffle(chosen)
    return tuple(chosen)


def _has_length(codec: Codec, request: dict) -> bool:
    if not isinstance(request.get("text"), str):
        return False
    input_ids = codec.encode([request]).get("input_ids")
    return input_ids is not None and input_ids.ndim == 2


def _num_tokens(codec: Codec, request: dict, text: str) -> int:
    return codec.encode([request | {"text": text}])["input_ids"].shape[1]


def _join_from(texts: Sequence[str], start: int, num_characters: int) -> str:
    """Texts from `start` on, around the end, joined until they are long enough."""
    joined = ""
    index = start
    while len(joined) < num_characters:
        joined += texts[index % len(texts)] + " "
        index += 1
    return joined[:num_characters]


def _cut(codec: Codec, request: dict, text: str, length: int) -> str:
    """The shortest beginning of the text that has `length` tokens; the nearest above where none has."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high) // 2
        if _num_tokens(codec, request, text[:middle]) >= length:
            high = middle
        else:
            low = middle + 1
    for end in range(low, min(low + _SEARCH_CHARACTERS, len(text)) + 1):
        if _num_tokens(codec, request, text[:end]) == length:
            return text[:end]
    logger.warning("no beginning of a text has exactly %d tokens; one of %d is timed", length, _num_tokens(codec, request, text[:low]))
    return text[:low]
