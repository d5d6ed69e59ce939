"""Which text encoding a file has: said by the user, marked in the file, UTF-8, or detected where only one reading is likely."""

import codecs
import difflib
import encodings.aliases

from ml.errors import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 200_000
# A reading as messy as this is noise; a rival that is no messier than the best by this much may be the right one.
_LARGEST_MESS = 0.1
_RIVAL_MARGIN = 0.05
# How much of a language's usual letters must be seen. Chance readings (Russian as Japanese) reach 0.
_LEAST_COHERENCE = 0.1


def decode(data: bytes, encoding: str | None, name: str) -> tuple[str, str]:
    """Bytes of a text file -> its text and the encoding that was used.

    Args:
        encoding: as the user gave it, or None to find out.
        name: of the file, for messages.

    Raises:
        DataError: an unknown encoding, bytes that it cannot read, or no encoding that is clearly the right one.
            The message shows the bytes and what to say as ENCODING=.
    """
    if encoding is not None:
        return _decode_as(data, encoding, name)
    for mark, marked in _MARKS:
        if data.startswith(mark):
            return _strictly(data, marked, name, f"it is marked as {marked}; write the file again, or say what it is, e.g. ENCODING=cp1252")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        if _is_damaged_utf8(data):
            raise DataError(
                f"{name} is UTF-8 with damaged bytes: byte {error.start} and after are {_hex(data, error.start)}, which is no UTF-8. "
                "Repair or write the file again; if it is not UTF-8 at all, say what it is, e.g. ENCODING=cp1252"
            ) from error
        return _detect(data, error.start, name)


def _decode_as(data: bytes, encoding: str, name: str) -> tuple[str, str]:
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        close = difflib.get_close_matches(encoding.lower().replace("-", "_"), list(encodings.aliases.aliases), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"ENCODING={encoding} is not a known encoding{hint}; common: utf-8, cp1252, latin-1, gb18030, shift_jis") from None
    if known == "utf-8":
        known = "utf-8-sig"
    try:
        return _strictly(data, known, name, "the file has another encoding: leave ENCODING= empty to have it detected, or say which")
    except LookupError:
        raise DataError(f"ENCODING={encoding} does not turn bytes into text; common: utf-8, cp1252, latin-1, gb18030") from None


def _strictly(data: bytes, encoding: str, name: str, advice: str) -> tuple[str, str]:
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} cannot be read as {encoding}: byte {error.start} and after are {_hex(data, error.start)} ({error.reason}); {advice}"
        ) from error


def _is_damaged_utf8(data: bytes) -> bool:
    """Whether most of what is not ASCII is good UTF-8, which does not happen by chance."""
    readable = data.decode("utf-8", errors="ignore")
    num_good = sum(1 for character in readable if character > "\x7f")
    return num_good > data.decode("utf-8", errors="replace").count("\ufffd")


def _detect(data: bytes, offset: int, name: str) -> tuple[str, str]:
    from charset_normalizer import from_bytes

    found = f"{name} is not UTF-8 (byte {offset} and after are {_hex(data, offset)})"
    matches = [match for match in from_bytes(_sample(data)) if match.chaos < _LARGEST_MESS]
    best = matches[0] if matches else None
    rivals = [match for match in matches[1:] if best and match.chaos <= best.chaos + _RIVAL_MARGIN and str(match) != str(best)]
    if best is None or best.coherence < _LEAST_COHERENCE or rivals:
        likely = [match.encoding for match in ([best, *rivals] if best else [])]
        likely.sort(key=lambda encoding: encoding != "cp1252")  # by far the commonest where several fit
        readings = [reading for encoding in likely[:3] if (reading := _reading(data, offset, encoding))]
        shown = "; it would read " + ", ".join(readings) if readings else ""
        example = likely[0] if readings else "gb18030"
        raise DataError(f"{found}, and its encoding cannot be told for sure{shown}. Say which it is, e.g. ENCODING={example}")
    try:
        return data.decode(best.encoding), best.encoding
    except UnicodeDecodeError as error:
        raise DataError(
            f"{found}; it looks like {best.encoding}, but byte {error.start} and after are {_hex(data, error.start)}, "
            f"which is no {best.encoding}. Say which encoding it is, e.g. ENCODING=gb18030, or write the file as UTF-8"
        ) from error


def _sample(data: bytes) -> bytes:
    """Lines that are not plain ASCII, from all over the file: only these tell encodings apart."""
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]
    step = max(1, sum(map(len, lines)) // _SAMPLE_BYTES)
    return b"".join(lines[::step])[: 2 * _SAMPLE_BYTES] or data[:_SAMPLE_BYTES]


def _reading(data: bytes, offset: int, encoding: str) -> str | None:
    start = data.rfind(b"\n", 0, offset) + 1
    start = max(start, offset - 20)
    try:
        text = data[start : offset + 20].decode(encoding, errors="ignore")
    except LookupError:
        return None
    return f"{' '.join(text.split())!r} as {encoding}"


def _hex(data: bytes, offset: int) -> str:
    return data[offset : offset + 4].hex(" ").upper()
