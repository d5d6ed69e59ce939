"""One `tokenizer.json` per model, fitted to the training texts where the encoder's own does not know their characters."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from ml.errors import ConfigError
from ml.text_classification.codec import TOKENIZER_FILE
from ml.text_classification.encoders import has_trained_weights, read_config, read_recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_UNKNOWN_SHARE = 0.02
MAX_ADDED_TOKENS = 4_000
# A character that occurs once stays unknown, so that the unknown token still means "rare" to the model.
MIN_OCCURRENCES = 2
SAMPLED_TEXTS = 20_000
TEXTS_PER_CALL = 1_000
# For encoders without a limit of their own; the cap of the settings is what holds.
UNLIMITED_TOKENS = 8_192
# These count positions from pad_id + 1.
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}


@dataclass(frozen=True)
class TokenizerInfo:
    """What was prepared.

    Args:
        pad_id: token id to pad with.
        vocab_size: rows that the embedding table needs: the highest token id + 1.
        max_tokens: the longest input that the encoder's positions allow.
        num_added_tokens: characters added to the vocabulary.
        num_dropped_tokens: entries left out because no training text has them (recipe `vocabulary: seen`).
        unknown_share_before, unknown_share_after: share of unknown tokens among all tokens of the training texts.
    """

    pad_id: int
    vocab_size: int
    max_tokens: int
    num_added_tokens: int
    num_dropped_tokens: int
    unknown_share_before: float
    unknown_share_after: float


def prepare_tokenizer(encoder_dir: Path, train_texts: Sequence[str], output_path: Path) -> TokenizerInfo:
    """Write the tokenizer for this encoder and these texts to `output_path`; truncation and padding are off.

    When more than 2 % of the tokens are unknown (Chinese in an English WordPiece vocabulary), the missing characters are
    added, most frequent first, so that texts are not rows of [UNK]; the encoder's table grows by as many rows.

    Raises:
        ConfigError: the encoder has no tokenizer that `tokenizers` can run.
    """
    tokenizer = _load_tokenizer(encoder_dir)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_config(encoder_dir).get_text_config()
    pad_token = _pad_token(tokenizer, encoder_dir, config)
    size_before = tokenizer.get_vocab_size()
    sample = train_texts[:: math.ceil(len(train_texts) / SAMPLED_TEXTS) or 1]
    unknown_before = unknown_after = unknown_share(tokenizer, sample)

    num_added = 0
    if unknown_before > MAX_UNKNOWN_SHARE and (missing := _missing_pieces(tokenizer, sample)):
        tokenizer = _with_pieces(tokenizer, missing, first_id=max(config.vocab_size, _table_size(tokenizer)))
        num_added = len(missing)
        unknown_after = unknown_share(tokenizer, sample)
    if read_recipe(encoder_dir).vocabulary == "seen" and not has_trained_weights(encoder_dir):
        tokenizer = _with_seen_tokens_only(tokenizer, train_texts, keep=_tokens_in_use(tokenizer, config) | {pad_token})

    output_path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_path))
    pad_id = tokenizer.get_vocab(with_added_tokens=True)[pad_token]
    return TokenizerInfo(
        pad_id=pad_id,
        vocab_size=_table_size(tokenizer),
        max_tokens=_max_tokens(config, pad_id),
        num_added_tokens=num_added,
        num_dropped_tokens=size_before + num_added - tokenizer.get_vocab_size(),
        unknown_share_before=unknown_before,
        unknown_share_after=unknown_after,
    )


def unknown_share(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Unknown tokens / all tokens, special tokens left out; 0 for byte-level tokenizers, which know everything."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = tokenizer.token_to_id(unknown) if unknown else getattr(tokenizer.model, "unk_id", None)
    if unknown_id is None:
        return 0.0
    num_unknown = num_tokens = 0
    for encoding in _encode(tokenizer, texts):
        num_unknown += encoding.ids.count(unknown_id)
        num_tokens += len(encoding.ids)
    return num_unknown / num_tokens if num_tokens else 0.0


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    """Encodings without special tokens, made in parallel, but never all in memory."""
    for start in range(0, len(texts), TEXTS_PER_CALL):
        yield from tokenizer.encode_batch(list(texts[start : start + TEXTS_PER_CALL]), add_special_tokens=False)


def _load_tokenizer(encoder_dir: Path) -> Tokenizer:
    path = encoder_dir / TOKENIZER_FILE
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        # Older checkpoints hold a vocabulary only (vocab.txt, merges.txt, *.model): transformers knows how each is read.
        converted = AutoTokenizer.from_pretrained(encoder_dir, local_files_only=True, trust_remote_code=False)
        return Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises bare Exception, transformers half a dozen kinds
        raise ConfigError(
            f"{encoder_dir}: its tokenizer cannot be read ({type(error).__name__}: {error}). Save it as tokenizer.json, "
            "AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder), or choose another encoder."
        ) from error


def _table_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _tokens_in_use(tokenizer: Tokenizer, config: "PretrainedConfig") -> set[str]:
    """The special tokens that the config speaks of by id."""
    ids = (getattr(config, role, None) for role in ("bos_token_id", "eos_token_id", "pad_token_id"))
    return {token for token_id in ids if isinstance(token_id, int) and (token := tokenizer.id_to_token(token_id)) is not None}


def _pad_token(tokenizer: Tokenizer, encoder_dir: Path, config: "PretrainedConfig") -> str:
    """The token the encoder was made to be padded with; some position schemes count on it (RoBERTa)."""
    roles = _special_roles(encoder_dir)
    pad_id, eos_id = config.pad_token_id, config.eos_token_id
    candidates = [
        tokenizer.id_to_token(pad_id) if isinstance(pad_id, int) else None,
        roles.get("pad_token"),
        *("[PAD]", "<pad>", "<|pad|>", "<｜▁pad▁｜>"),
        roles.get("eos_token"),
        tokenizer.id_to_token(eos_id) if isinstance(eos_id, int) else None,
        tokenizer.id_to_token(0),
    ]
    for token in candidates:
        if token is not None and tokenizer.token_to_id(token) is not None:
            return token
    raise ConfigError(f"{encoder_dir}: its tokenizer has no token to pad with; name one as pad_token in tokenizer_config.json")


def _special_roles(encoder_dir: Path) -> dict[str, str]:
    """Role -> token, such as pad_token -> [PAD], from the files that name them."""
    roles = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = encoder_dir / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for role, value in settings.items():
            content = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(content, str):
                roles[role] = content
    return roles


def _max_tokens(config: "PretrainedConfig", pad_id: int) -> int:
    positions = getattr(config, "max_position_embeddings", None) or UNLIMITED_TOKENS
    return positions - (pad_id + 1 if config.model_type in OFFSET_POSITIONS else 0)


def _missing_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """WordPiece entries for the characters that make words unknown, most frequent first.

    A character needs one entry as the first of a word and another inside one ("##x"). BERT's normalizer makes each
    Chinese character a word of its own.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "WordPiece":
        return []
    words: Counter[str] = Counter()
    for text in texts:
        normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normalized) if tokenizer.pre_tokenizer else [(normalized, (0, 0))]
        words.update(word for word, _ in pieces)
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    missing: Counter[str] = Counter()
    for word, count in words.items():
        if len(word) > model["max_input_chars_per_word"] or tokenizer.model.tokenize(word)[0].value != model["unk_token"]:
            continue
        for position, character in enumerate(word):
            piece = character if position == 0 else prefix + character
            if piece not in vocabulary:
                missing[piece] += count
    ranked = sorted(missing.items(), key=lambda item: (-item[1], item[0]))
    return [piece for piece, count in ranked if count >= MIN_OCCURRENCES][:MAX_ADDED_TOKENS]


def _with_pieces(tokenizer: Tokenizer, pieces: Sequence[str], first_id: int) -> Tokenizer:
    description = json.loads(tokenizer.to_str())
    description["model"]["vocab"].update({piece: first_id + index for index, piece in enumerate(pieces)})
    return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def _with_seen_tokens_only(tokenizer: Tokenizer, texts: Sequence[str], keep: set[str]) -> Tokenizer:
    """A byte-level BPE tokenizer cut down to what these texts use: the same tokens for these texts, renumbered.

    Kept are the 256 bytes, so that any text can still be written, the tokens of the texts, and those that arise on the
    way to them: a token is made by the same merges wherever it stands, so they are found by replaying them on it alone.
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(description["pre_tokenizer"]):
        raise ConfigError('millstream.json: "vocabulary": "seen" needs a byte-level BPE tokenizer; write "full"')
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    seen = {token for encoding in _encode(tokenizer, texts) for token in encoding.tokens}
    used: set[tuple[str, ...]] = set()
    for token in seen & set(model["vocab"]):
        used |= _merges_of(token, ranks)
    pieces = {*ByteLevel.alphabet(), *(seen & set(model["vocab"])), *("".join(pair) for pair in used), *(s for pair in used for s in pair)}
    pieces &= set(model["vocab"])

    # Special tokens keep their ids: the config names them by id, and some architectures count on the padding id.
    special = {entry["id"]: entry["content"] for entry in description["added_tokens"] if entry["content"] in keep}
    others = iter(sorted(pieces - set(special.values()), key=lambda piece: model["vocab"][piece]))
    num_tokens = len(pieces | set(special.values()))
    if max(special) >= num_tokens:
        raise ConfigError(
            f'millstream.json: "vocabulary": "seen" would leave {num_tokens} tokens, but the special token {special[max(special)]!r} '
            f'has the id {max(special)}; write "full"'
        )
    ids = {special[index] if index in special else next(others): index for index in range(num_tokens)}
    description["added_tokens"] = [entry for entry in description["added_tokens"] if entry["content"] in keep]
    model["vocab"] = ids
    model["merges"] = [pair for pair in model["merges"] if tuple(pair) in used]
    return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def _merges_of(token: str, ranks: dict[tuple[str, ...], int]) -> set[tuple[str, ...]]:
    """The merges that build a token from its characters, lowest rank first."""
    parts, used = list(token), set()
    while len(parts) > 1:
        pairs = [(ranks.get((left, right)), index) for index, (left, right) in enumerate(itertools.pairwise(parts))]
        known = [(rank, index) for rank, index in pairs if rank is not None]
        if not known:
            break
        index = min(known)[1]
        used.add((parts[index], parts[index + 1]))
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return used
