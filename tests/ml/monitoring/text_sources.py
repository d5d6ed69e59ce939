"""Texts drawn from a source whose every property a test can turn."""

from collections.abc import Sequence

import numpy as np

# The tiny bundle knows these and no other word, so its answers depend on them.
FEELINGS = ("awful", "bad", "boring", "fine", "good", "great", "warm")
VOCABULARY_SIZE = 3_000


class TextSource:
    """Draws texts of words by Zipf's law, of lengths by a log-normal law, with one or two words of feeling in each.

    Args:
        vocabulary: prefix of the words; another one shares no word.
        median_length: words of a text.
        shuffled: the same words, but others of them frequent.
    """

    def __init__(self, seed: int, *, vocabulary: str = "w", median_length: float = 15, shuffled: bool = False):
        self._random = np.random.default_rng(seed)
        self._words = np.array([f"{vocabulary}{number}" for number in range(VOCABULARY_SIZE)])
        if shuffled:
            self._words = np.random.default_rng(0).permutation(self._words)
        weights = 1 / np.arange(1, VOCABULARY_SIZE + 1)
        self._weights = weights / weights.sum()
        self._median_length = median_length

    def draw(self, num_texts: int, feelings: Sequence[str] = FEELINGS) -> list[str]:
        return [self._text(feelings) for _ in range(num_texts)]

    def _text(self, feelings: Sequence[str]) -> str:
        length = max(3, round(self._median_length * self._random.lognormal(0, 0.4)))
        words = [*self._random.choice(self._words, length, p=self._weights), *self._random.choice(feelings, 2)]
        self._random.shuffle(words)
        return " ".join(words)
