"""Cleaning of labelled texts: what every rule changes or drops is counted, and dropped rows are kept with the reason."""

import html
import re
from typing import TYPE_CHECKING

import xxhash

from ml.config import CleanConfig
from ml.data.near_duplicates import find_near_duplicates
from ml.text_classification.label_leaks import cut_label_leaks

if TYPE_CHECKING:
    import pandas as pd

# Rules that change texts, in the order in which they run, then rules that drop rows.
CHANGING_RULES: tuple[str, ...] = ("encoding", "html", "control_characters", "urls", "label_leaks", "whitespace")
DROPPING_RULES: tuple[str, ...] = ("empty", "exact_duplicate", "conflicting_label", "near_duplicate")

# Attributes need a value, so that "x <y and z> w" is no tag.
_TAG = re.compile(r"</?([a-zA-Z][\w:-]{0,30})(?:\s+[\w:@.-]{1,60}\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+))*\s*/?>")
# Neither may hold the start of another, so that a thousand comments that never end take no quadratic time.
_HIDDEN = re.compile(
    r"<!--(?:[^<-]|-(?!->)|<(?!!--))*+-->|<(script|style)\b[^<>]*>(?:[^<]|<(?!/?(?:script|style)\b))*+</\1\s*>", re.IGNORECASE
)
# Tags inside a word or before punctuation; any other tag parts words.
_INLINE = re.compile("a|abbr|b|big|code|del|em|font|i|ins|mark|q|s|small|span|strike|strong|sub|sup|tt|u", re.IGNORECASE)
# C0 and C1 controls but white space, and invisible format characters: zero-width space, soft hyphen, byte order mark,
# direction marks. The joiners U+200C and U+200D stay: Persian words and family emoji are written with them.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_C1 = re.compile("[\x80-\x9f]")
# Only ASCII: Chinese text often follows an address without a space.
_URL = re.compile(r"(?:\b(?:https?|ftp)://|\bwww\.)[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*[A-Za-z0-9/_~#=&%-]", re.IGNORECASE | re.ASCII)
_WHITESPACE = re.compile(r"\s+")


def clean_texts(frame: "pd.DataFrame", config: CleanConfig) -> "tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]":
    """Repair texts and set aside duplicates and empty texts.

    Rows without a text or a label pass unchanged: the data contract speaks of them.

    Where the table has a `split` column, held-out rows are looked at first, so of two alike rows the one in test
    stays before the one in validation, and that before the one in train. Otherwise the earlier row stays.

    Time: 50,000 reviews of 234 words take about 25 s of one core, half of it the search for near duplicates.

    Args:
        frame: `row_id`, `text`, `label` and, where the user named them, `split` and `group`; strings.

    Returns:
        kept: the same rows in the same order less the dropped ones, texts clean, and `group`: rows of one group
            must not be parted across splits. It is a hash of the clean text that leads the group, or of the user's
            own group, so it does not change when rows are appended.
        dropped: rows with their original text, `group`, and the `reason`, one of `DROPPING_RULES`.
        counts: rule -> rows that it changed or dropped.
    """
    counts: dict[str, int] = dict.fromkeys((*CHANGING_RULES, *DROPPING_RULES), 0)
    originals = [text if isinstance(text, str) else None for text in frame["text"].tolist()]
    texts = [None if text is None else _clean_text(text, config, counts) for text in originals]
    labels = [label if isinstance(label, str) else None for label in frame["label"].tolist()]
    reasons: list[str | None] = [None] * len(texts)
    owners = _owners(frame)
    groups = _own_groups(texts, frame)

    usable: list[int] = []
    for row in _order(frame):
        text = texts[row]
        if text is None or labels[row] is None:
            continue
        if len(text) < config.min_characters:
            reasons[row] = "empty"
        else:
            usable.append(row)

    first_of: dict[str, int] = {}
    conflicting: set[str] = set()
    for row in usable:
        text = str(texts[row])
        first = first_of.setdefault(text, row)
        if labels[row] != labels[first]:
            conflicting.add(text)
    distinct = list(first_of.values())
    if config.drop_exact_duplicates:
        for row in usable:
            text = str(texts[row])
            if text in conflicting:
                reasons[row] = "conflicting_label"
            elif row != first_of[text]:
                reasons[row] = "exact_duplicate"

    if config.drop_near_duplicates:
        # Texts with conflicting labels take part: were they left out, a conflict that is appended later could change
        # which rows lead their group.
        found = find_near_duplicates(
            [str(texts[row]) for row in distinct],
            [labels[row] for row in distinct],
            config.near_duplicate_similarity,
            None if owners is None else [owners[row] for row in distinct],
        )
        for position, row in enumerate(distinct):
            groups[row] = groups[distinct[found.leaders[position]]]
            if found.dropped[position] and reasons[row] is None:
                reasons[row] = "near_duplicate"
    if not config.drop_exact_duplicates and owners is None:
        for row in usable:
            groups[row] = groups[first_of[str(texts[row])]]

    for reason in reasons:
        if reason is not None:
            counts[reason] += 1
    kept, dropped = _tables(frame, texts, groups, reasons)
    return kept, dropped, counts


def _clean_text(text: str, config: CleanConfig, counts: dict[str, int]) -> str:
    if config.fix_encoding and not text.isascii():
        text = _changed("encoding", text, _fix_mojibake(text), counts)
    if config.strip_html and ("<" in text or "&" in text):
        text = _changed("html", text, _strip_html(text), counts)
    if config.strip_control_characters:
        text = _changed("control_characters", text, _strip_controls(text), counts)
    if config.strip_urls and ("://" in text or "www." in text.lower()):
        text = _changed("urls", text, _URL.sub(" ", text), counts)
    # Ratings are written with any white space, so it goes first; what they leave behind is no finding of its own.
    text = _changed("whitespace", text, _WHITESPACE.sub(" ", text).strip(), counts)
    if config.strip_label_leaks:
        text = _changed("label_leaks", text, cut_label_leaks(text), counts)
        text = _WHITESPACE.sub(" ", text).strip()
    return text


def _changed(rule: str, before: str, after: str, counts: dict[str, int]) -> str:
    if after != before:
        counts[rule] += 1
    return after


def _fix_mojibake(text: str) -> str:
    """Undo UTF-8 that was read as another encoding ("cafÃ©"); full-width characters, quotes and ligatures stay."""
    import ftfy
    from ftfy.fixes import fix_c1_controls

    fixed = ftfy.fix_encoding(text)
    # Lone C1 controls are the affair of the next rule, and counted there.
    return text if fixed == fix_c1_controls(text) else fixed


def _strip_html(text: str) -> str:
    unescaped = html.unescape(text)
    visible = _HIDDEN.sub(" ", unescaped) if "<!--" in unescaped or "</s" in unescaped.lower() else unescaped
    return _TAG.sub(lambda tag: "" if _INLINE.fullmatch(tag.group(1)) else " ", visible)


def _strip_controls(text: str) -> str:
    if _C1.search(text):
        from ftfy.fixes import fix_c1_controls

        # Nobody writes C1 controls: they are Windows-1252 punctuation that was read as Latin-1.
        text = fix_c1_controls(text)
    return _CONTROL.sub("", text)


def _order(frame: "pd.DataFrame") -> list[int]:
    """Row positions, held-out rows first; the order of the table otherwise."""
    if "split" not in frame:
        return list(range(len(frame)))
    rank = {"test": 0, "validation": 1}
    splits = frame["split"].tolist()
    return sorted(range(len(splits)), key=lambda row: rank.get(splits[row], 2))


def _owners(frame: "pd.DataFrame") -> list[tuple] | None:
    """To whom each row belongs already: the user's own split and group."""
    columns = [name for name in ("split", "group") if name in frame]
    return list(frame[columns].itertuples(index=False, name=None)) if columns else None


def _own_groups(texts: list[str | None], frame: "pd.DataFrame") -> list[str]:
    """The group of each row before any search: the user's, else that of its clean text."""
    given = frame["group"].tolist() if "group" in frame else [None] * len(texts)
    return [
        _digest(f"group:{group}") if isinstance(group, str) else _digest(f"text:{text or ''}")
        for group, text in zip(given, texts, strict=True)
    ]


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _tables(
    frame: "pd.DataFrame", texts: list[str | None], groups: list[str], reasons: list[str | None]
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    import pandas as pd

    columns = ["row_id", "text", "label", "group", *(["split"] if "split" in frame else [])]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    out = [row for row, reason in enumerate(reasons) if reason is not None]

    def rows(chosen: list[int], **changed: list[str | None]) -> pd.DataFrame:
        table = frame.iloc[chosen].reset_index(drop=True)
        for column, values in {"group": groups, **changed}.items():
            table[column] = pd.Series([values[row] for row in chosen], dtype="str")
        return table[[*columns, *(column for column in changed if column not in columns)]]

    return rows(kept, text=texts), rows(out, reason=reasons)
