"""Words of a text in any script, for duplicate search and statistics. Models have tokenizers of their own."""

import re

# Scripts written without spaces: Thai to Lao, Tibetan to Myanmar, Khmer, kana, ideographs (three planes).
_UNSPACED = "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:'[^\W_{_UNSPACED}]+)*")
_UNSPACED_WORD = re.compile(f"[{_UNSPACED}]")


def words_of(text: str) -> list[str]:
    """Lower-case words in order; in scripts without spaces (Chinese, Japanese, Thai ...) each character is one.

    A text that has neither letters nor digits, such as a row of emoji, gives its characters.
    """
    lower = text.lower()
    return _WORD.findall(lower) or [character for character in lower if not character.isspace()]


def is_unspaced(word: str) -> bool:
    """Whether a word of `words_of` is one character of a script without spaces."""
    return _UNSPACED_WORD.match(word) is not None
