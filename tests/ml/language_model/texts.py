"""Texts to train a small language model on, and a tokenizer for them."""

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = (
    "the",
    "a",
    "film",
    "was",
    "good",
    "bad",
    "long",
    "short",
    "and",
    "but",
    "we",
    "they",
    "saw",
    "it",
    "twice",
    "never",
    "with",
    "friends",
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    choices = random.Random(seed)
    return [" ".join(choices.choices(WORDS, k=choices.randint(3, 60))) for _ in range(count)]


def write_tokenizer(path: Path, texts: list[str], vocabulary: int = 300) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path
