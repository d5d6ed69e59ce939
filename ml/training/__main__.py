"""One rank, started by torchrun: `-m ml.training --spec <spec.json> --attempt <folder> --launched <unix time>`."""

from ml.training.processes import die_with_parent

if __name__ == "__main__":
    # Before torch is imported, which takes seconds in which the launcher may die.
    die_with_parent()

    from ml.training.worker import main

    main()
