"""torchrun, ended by the system when the launcher ends: `python -m ml.training.elastic <arguments of torchrun>`."""

from ml.training.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()

    from torch.distributed.run import main

    main()
