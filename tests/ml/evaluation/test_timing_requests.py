import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ml.config import EvaluateConfig
from ml.errors import DataError
from ml.evaluation.timing_requests import choose_requests
from ml.text_classification.codec import TextClassifierCodec

CONFIG = EvaluateConfig(latency_length_tokens=12, throughput_batch_size=8, memory_requests=40)


def codec_of(vocabulary: dict[str, int], max_length: int) -> TextClassifierCodec:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    return TextClassifierCodec(tokenizer, ("no", "yes"), max_length, 0)


@pytest.fixture
def pieces() -> TextClassifierCodec:
    """Splits words into pieces of several characters, so not every beginning of a text adds one token."""
    words = ["[PAD]", "[UNK]", "film", "##ing", "play", "##ful", "good", "a", "the", "##s", ".", "f", "##i", "##l", "##m"]
    return codec_of({word: index for index, word in enumerate(words)}, 64)


def texts(num_rows: int) -> list[dict]:
    random = np.random.default_rng(0)
    return [
        {"text": " ".join(random.choice(["filming", "playful", "good", "a", "films", "."], random.integers(1, 40)))}
        for _ in range(num_rows)
    ]


def test_every_timed_request_has_the_exact_length(pieces: TextClassifierCodec) -> None:
    chosen = choose_requests(pieces, texts(100), CONFIG)
    assert chosen.length_tokens == 12
    assert [pieces.encode([request])["input_ids"].shape[1] for request in chosen.batch] == [12] * 8
    assert len({request["text"] for request in chosen.batch}) > 4


def test_texts_shorter_than_wanted_are_joined(pieces: TextClassifierCodec) -> None:
    chosen = choose_requests(pieces, [{"text": "good"}, {"text": "a film"}], CONFIG)
    assert [pieces.encode([request])["input_ids"].shape[1] for request in chosen.batch] == [12] * 8


def test_a_model_that_keeps_fewer_tokens_is_timed_with_those() -> None:
    codec = codec_of({"[PAD]": 0, "[UNK]": 1, "good": 2}, 6)
    chosen = choose_requests(codec, [{"text": "good " * 30}], CONFIG)
    assert chosen.length_tokens == 6
    assert codec.encode(chosen.batch)["input_ids"].shape == (8, 6)


def test_texts_without_spaces_reach_the_length_too() -> None:
    characters = "这部电影很好看"
    codec = codec_of({word: index for index, word in enumerate(["[PAD]", "[UNK]", *characters, *(f"##{c}" for c in characters)])}, 64)
    chosen = choose_requests(codec, [{"text": characters * 5}], CONFIG)
    assert codec.encode(chosen.batch)["input_ids"].shape == (8, 12)


def test_the_mixture_has_the_shortest_and_the_long_ones_in_a_fixed_order(pieces: TextClassifierCodec) -> None:
    requests = texts(500)
    chosen, again = choose_requests(pieces, requests, CONFIG), choose_requests(pieces, requests, CONFIG)
    assert chosen == again
    lengths = [len(request["text"]) for request in chosen.mixed]
    assert len(lengths) == 40
    assert min(lengths) == min(len(request["text"]) for request in requests)
    assert max(lengths) > 0.9 * max(len(request["text"]) for request in requests)
    assert lengths != sorted(lengths)


def test_few_requests_are_asked_again_and_again(pieces: TextClassifierCodec) -> None:
    chosen = choose_requests(pieces, texts(3), CONFIG)
    assert len(chosen.mixed) == 40
    assert len(chosen.batch) == 8


def test_requests_that_are_no_texts_are_taken_as_they_are() -> None:
    class PictureCodec:
        def encode(self, requests):
            return {"pixels": np.zeros((len(requests), 3))}

        def decode(self, requests, outputs):
            return []

    requests = [{"pixels": [index]} for index in range(5)]
    chosen = choose_requests(PictureCodec(), requests, CONFIG)
    assert chosen.length_tokens is None
    assert chosen.batch == tuple(requests[index % 5] for index in range(8))


def test_no_requests_is_a_clear_error(pieces: TextClassifierCodec) -> None:
    with pytest.raises(DataError, match="no requests"):
        choose_requests(pieces, [], CONFIG)
