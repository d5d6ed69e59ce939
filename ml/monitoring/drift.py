"""All tests of one window: what callers sent, what they were answered, and what new data brought, against the reference."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from ml.data.words import words_of
from ml.monitoring.findings import Finding
from ml.monitoring.sample_tests import compare_classes, compare_values
from ml.monitoring.word_tests import compare_meanings, compare_words


@dataclass(frozen=True)
class TextSample:
    """Distinct texts of one source, none of which was trained on."""

    texts: tuple[str, ...]

    @property
    def lengths(self) -> list[int]:
        return [len(words_of(text)) for text in self.texts]


@dataclass(frozen=True)
class AnswerSample:
    """What one version of the model answered to distinct requests: class and probability of each."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def compare_texts(sample: str, reference: TextSample, current: TextSample, known_words: Set[str], seed: int = 0) -> list[Finding]:
    """Length, unknown words, word frequencies and meaning: tests that need no label."""
    return [
        compare_values("length", sample, reference.lengths, current.lengths, "words"),
        *compare_words(sample, reference.texts, current.texts, known_words, seed),
        compare_meanings(sample, reference.texts, current.texts, seed),
    ]


def compare_answers(sample: str, reference: AnswerSample, current: AnswerSample) -> list[Finding]:
    """Which classes were answered, and how surely."""
    return [
        compare_classes("predicted classes", sample, reference.labels, current.labels),
        compare_values("confidence", sample, reference.probabilities, current.probabilities, "probability"),
    ]


def distinct(texts: Sequence[str]) -> list[int]:
    """Positions of the first of each text. A caller that repeats one text says nothing new about its source, and tests
    take texts for independent; training data has no duplicates either."""
    first: dict[str, int] = {}
    for position, text in enumerate(texts):
        first.setdefault(text, position)
    return list(first.values())
