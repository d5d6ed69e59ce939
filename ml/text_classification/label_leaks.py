"""Ratings that writers put into their texts: a model that reads "8/10" learns to read digits, not opinions.

Each pattern is a form met in reviews. Where a form is also ordinary language ("the two stars of the film", "3/4 of
the audience", "a grade B movie") only its unambiguous use is cut.
"""

import re

_SMALL = "zero|half|one|two|three|four|five|six|seven|eight|nine|ten"
_DIGITS = r"\d{1,3}(?:[.,]\d{1,5})?"
_FRACTION = r"(?:\s*(?:and\s+a\s+half|&?\s*1/2|½))"
_NUMBER = rf"(?:{_DIGITS}{_FRACTION}?|(?:{_SMALL}){_FRACTION}?|1/2|½)"
_RANGE = rf"(?:{_NUMBER}\s*(?:-|–|to|or)\s*)?{_NUMBER}"
_ASTERISKS = rf"\*+{_FRACTION}?"
_OUT_OF = r"out\s+of(?:\s+a)?(?:\s+possible)?"
_SCALE = r"(?:\*{2,}|100|10|5|4|6|ten|five|four)"

_STAR = ("stars", "-star", *(f"star{mark}" for mark in " -.,;:!?)"))
_GIVE = tuple(f"{verb} {what}" for verb in ("give", "given", "giving", "gave", "rate", "rated", "rating") for what in ("it", "this"))

# Each is tried only when one of its triggers, lower-case pieces of text that any match holds, is there: most texts have none.
_FORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    # 4 out of 5 stars; 2 stars out of 10; *** out of ****; 1 (awful) out of 10
    (
        ("out of",),
        rf"(?<![\w.])(?:{_RANGE}|(?<!\*){_ASTERISKS})(?:\s*[-\s]\s*(?:stars?|points?|marks?)|\s*\([^()]{{1,20}}\))?\s*"
        rf"{_OUT_OF}\s*{_SCALE}(?![\w.]\d|\w)(?:\s*(?:stars?|points?)\b)?",
    ),
    # 8/10, 7.5 / 10, 85/100, 3/5; not 9/10/2004, and not 1/5 of the audience
    (
        ("/10", "/ 10", "/5", "/ 5"),
        rf"(?<![\w./])(?:{_DIGITS}\s*(?:-|–|to|or)\s*)?{_DIGITS}\s*/\s*(?:(?:10|100)(?![\w/]|\.\d)|5(?![\w/]|\.\d|\s+of\b))(?:\s*stars?\b)?",
    ),
    # 3.5/4, 2/4 stars: over four only where nothing else can be meant
    (("/4", "/ 4"), rf"(?<![\w./])(?:\d[.,]\d\s*/\s*4(?![\w/]|\.\d)|{_DIGITS}\s*/\s*4\s*stars?\b)"),
    # ***/*****, ***1/2, ****: not *really*, not s**t, not ****ing
    (("**", "*1", "* 1", "*½", "* ½", "*/", "* /"), rf"(?<![\w*])(?:{_ASTERISKS}\s*/\s*\*{{2,}}|\*+{_FRACTION}|\*{{2,5}})(?![\w*])"),
    # 3 stars, 3-star, 2 1/2 stars; a number in words only where it is not people: not "the two stars", not "with three stars"
    (_STAR, rf"(?<![\w.])(?:\d{{1,2}}(?:[.,]\d)?{_FRACTION}?|(?:{_SMALL}){_FRACTION})[\s-]*stars?\b"),
    (
        _STAR,
        r"(?=[zotfsen])\b(?<!the\s)(?<!its\s)(?<!her\s)(?<!his\s)(?<!with\s)(?<!these\s)(?<!those\s)(?<!their\s)(?<!all\s)(?<!other\s)"
        r"(?:(?:zero|one|two|three|four|five|six|seven|eight|nine|ten)(?:-stars?|\s+stars?)|no\s+stars)\b(?!\s+(?:of|in|who|are|were|have|had)\b)",
    ),
    # ★★★☆☆, ⭐⭐⭐, ★★½
    (("★", "⭐", "☆"), r"[★☆⭐\ufe0f]{2,}½?"),
    # Grade: B+, grade - A; I give it a C-
    (("grade",), r"\bgrades?\s*(?:(?:[:=]|-\s)\s*[A-F](?:\s?[+-])?(?![\w'’])|(?:of\s+|is\s+)?(?:an?\s+)?(?-i:[A-F])[+-](?!\w))"),
    (_GIVE, r"\b(?:giv(?:e|en|ing)|gave)\s+(?:it|this)\s+(?:an?\s+)(?-i:[A-DF])[+-]?(?![\w'’])"),
    # rating: 3, score = 8.5, vote - seven; I give it a 7, rated it 3; not 14A, not "gave it 2 hours"
    (("rating", "score", "vote"), rf"\b(?:ratings?|scores?|votes?)\s*[:=]\s*{_NUMBER}(?![\w/]|\.\d|\s?\+)"),
    (
        _GIVE,
        rf"\b(?:giv(?:e|en|ing)|gave|rated?|rating)\s+(?:it|this(?:\s+(?:movie|film|one|book|product|place))?+)\s+(?:an?\s+)?"
        rf"{_NUMBER}(?![\w/]|\.\d|\s*-?\s*(?:more|chances?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|tries|try|times?|thumbs?|of)\b)",
    ),
    # 8分 only after a word for giving marks (not 30分钟), 四颗星, 五星好评 (not 五星级酒店)
    (("分",), r"(?:打|给|給|评分|評分|得分)[了个個:：是为為]?\s*(?:\d{1,3}(?:\.\d)?|[零一二三四五六七八九十]{1,2})\s*分(?![钟鐘之])"),
    (("星",), r"(?:\d(?:\.\d)?|[零一二两兩三四五])\s*(?:[颗顆個个]半?星(?!级|級|期)|星半?(?=[好差中][评評]))"),
)
_COMPILED = tuple((triggers, re.compile(pattern, re.IGNORECASE)) for triggers, pattern in _FORMS)


def cut_label_leaks(text: str) -> str:
    """The text without ratings; each one is replaced by a space. Expects runs of white space to be single spaces."""
    lower = f"{text.lower()} "
    for triggers, pattern in _COMPILED:
        if any(trigger in lower for trigger in triggers):
            text = pattern.sub(" ", text)
    return text
