"""Distributed supervised training that survives kills: torch and nothing else of ours.

    launcher.run_training     the caller's side: starts the ranks, watches them, restarts them, never leaves one behind
      elastic                 torchrun, tied to the launcher's life
        __main__ -> worker    one rank
          loop.Trainer        plan, steps, validation, early stopping, checkpoints
            job.TrainingJob   what is trained: brought by the caller as an import string

All state lies in one work folder, see `folders`.
"""
