import pytest

from ml.data.encodings import decode
from ml.errors import DataError

FRENCH = "Ce film était magnifique, très émouvant et drôle à la fois\nJ'ai détesté chaque minute, le scénario est épouvantable\n" * 20
GERMAN = "Der Film war großartig, aber die Schauspieler überzeugten nicht völlig\nFür Kinder nicht geeignet, öde und übel\n" * 20
CHINESE = "这部电影真的很好看,演员演技在线,剧情也很紧凑\n一点也不好看,浪费时间,导演不知道在干什么\n" * 20
RUSSIAN = "Отличный фильм, всем советую посмотреть\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_and_utf8_files_are_read_without_a_guess(encoding: str) -> None:
    assert decode(FRENCH.encode(encoding), None, "a.csv") == (FRENCH, encoding)


@pytest.mark.parametrize(("text", "encoding"), [(GERMAN, "latin-1"), (CHINESE, "gb18030")])
def test_only_likely_reading_is_taken(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding), None, "a.csv")[0] == text


def test_several_likely_readings_are_shown_and_none_is_taken() -> None:
    with pytest.raises(DataError, match=r"ENCODING=cp1252") as raised:
        decode(FRENCH.encode("latin-1"), None, "a.csv")
    assert "était magnifique" in str(raised.value)
    assert "as cp1250" in str(raised.value)


def test_chance_reading_is_refused() -> None:
    """Two lines of Russian in KOI8-R happen to be well-formed Japanese."""
    with pytest.raises(DataError, match="ENCODING="):
        decode((RUSSIAN * 2).encode("koi8-r"), None, "a.csv")


def test_damaged_utf8_is_not_taken_for_another_encoding() -> None:
    data = FRENCH.encode().replace(b"\xc3\xa9mouvant", b"\xc3mouvant", 1)
    offset = data.index(b"\xc3mouvant")
    with pytest.raises(DataError, match=rf"damaged.*byte {offset} .*C3 6D"):
        decode(data, None, "a.csv")


def test_damage_far_into_a_file_is_found_at_its_place() -> None:
    data = CHINESE.encode("gb18030") * 200 + b"\xff\n"
    with pytest.raises(DataError, match=rf"byte {len(data) - 2} and after are FF"):
        decode(data, "gb18030", "a.csv")


def test_given_encoding_that_cannot_be_right_shows_the_bytes() -> None:
    with pytest.raises(DataError, match=r"a\.csv cannot be read as utf-8.*ENCODING="):
        decode(b"caf\xe9,1\n", "utf-8", "a.csv")


def test_byte_order_mark_is_no_text() -> None:
    assert decode(b"\xef\xbb\xbfa,b", "utf-8", "a.csv")[0] == "a,b"


@pytest.mark.parametrize(("given", "told"), [("latin_11", "did you mean 'latin1'"), ("hex", "does not turn bytes into text")])
def test_encoding_that_does_not_exist_is_told(given: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        decode(b"a", given, "a.csv")
