"""What one would write by hand: `torchrun --nproc-per-node 2 -m benchmarks.minimal_torchrun settings.json`.

DistributedDataParallel, fused AdamW, clipping, warm-up and decay, length-bucketed batches from a file, autocast to bf16 if asked
for, the loss printed every ten steps. No checkpoints, no validation, no history, no heartbeat, nothing measured, nothing caught.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.encoder import build_encoder, random_texts
from benchmarks.interleaved import Gate


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    texts = random_texts(settings["num_rows"], settings["seed"])
    batches = json.loads(Path(settings["batches"]).read_bytes())
    num_steps, num_warmup_steps = len(batches), settings["num_warmup_steps"]

    model = DistributedDataParallel(build_encoder(settings["seed"], **settings["sizes"]).train(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=0.01, fused=True)

    def rate(step: int) -> float:
        return (step + 1) / num_warmup_steps if step < num_warmup_steps else (num_steps - step) / (num_steps - num_warmup_steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    gate = Gate(Path(settings["gate"]), rank, settings["block_steps"])  # the benchmark's, not of the training
    with Path(settings["losses"]).with_suffix(f".{rank}.jsonl").open("w", encoding="utf-8") as log:
        for step, rows in enumerate(batches):
            batch = texts.batch(np.array(rows[rank::num_ranks]))
            gate.pass_through()
            with torch.autocast("cpu", dtype=torch.bfloat16) if settings["bf16"] else contextlib.nullcontext():
                logits = model(batch["input_ids"], batch["is_padding"])
                loss = nn.functional.cross_entropy(logits, batch["targets"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings["gradient_clip"])
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                log.write(json.dumps({"step": step + 1, "loss": loss.item()}) + "\n")
                log.flush()
    dist.barrier()
    # Tearing gloo down now and then aborts, when all is done.
    os._exit(0)


if __name__ == "__main__":
    main()
