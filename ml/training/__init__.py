"""Distributed supervised training that survives kills: torch and nothing else of ours.

    __main__ -> command_line    by hand: `python -m ml.training --spec <file>`
    launcher.run_training       the caller's side: starts this machine's ranks, watches them, restarts them, never leaves one behind
      watching, nodes           signs of life, and why ranks ended; how several machines meet
      elastic                   torchrun, tied to the launcher's life
        worker                  one rank
          loop.train            steps, validation, early stopping, checkpoints, poisoned batches
            starting            before the first step: layout, measured plan (probe, plan), FLOPs
            feeding             rows of each step and rank (batches, shares), batches made ahead (prefetch)
            stepping            one step in any layout: strategies/, gradient_sync, precision, optimizers
            checkpoint          DCP in the background, safetensors (checkpoint_storage)
            meters, diagnosis   figures of each rank, and what they mean in words
            job.TrainingJob     what is trained: brought by the caller as an import string

All state lies in one work folder, see `folders`.
"""
