"""Tiny encoders in the Hugging Face layout, made on the spot, so that tests need neither network nor large files."""

import json
from pathlib import Path

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz") + tuple(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
WORDS = ("good", "bad", "film", "the", "a", "was", "##s", ".", ",", "!")
VOCABULARY = tuple(dict.fromkeys(SPECIAL_TOKENS + LETTERS + WORDS))
DEEPSEEK_CONFIG = Path(__file__).resolve().parent.parent / "solutions/sentiment/encoders/deepseek_v3_tiny"


def write_tiny_bert(folder: Path, *, with_weights: bool = True, vocabulary_only: bool = False, seed: int = 0) -> Path:
    """A BERT of 2 layers and width 32 with a WordPiece vocabulary of letters and a few words.

    Args:
        with_weights: write `model.safetensors`; without, the folder is an architecture only.
        vocabulary_only: write `vocab.txt` instead of `tokenizer.json`, as old checkpoints have it.
    """
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    if with_weights:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    if vocabulary_only:
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    else:
        wordpiece_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def wordpiece_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_tiny_deepseek(folder: Path, texts: list[str], **changes: object) -> Path:
    """The committed tiny DeepSeek-V3, smaller still, with a byte-level BPE tokenizer trained on these texts.

    `changes` go into its `config.json`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((DEEPSEEK_CONFIG / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder
