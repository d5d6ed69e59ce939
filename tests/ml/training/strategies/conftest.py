"""What runs in several ranks, all in one start of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from ml.training.ranks import RankGroup
from tests.ml.training.strategies import in_ranks as tried
from tests.ml.training.strategies.cases import Case, in_ranks, run_all, run_cases
from tests.ml.training.strategies.grid import IN_FOUR, IN_TWO, TEXT
from tests.ml.training.strategies.text_job import write_prepared_texts
from tests.tiny_encoders import write_tiny_bert, write_tiny_deepseek


class Texts:
    """The folder of all trainings, and the cases with what the text classifier's job needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._arguments = {
            ".": write_prepared_texts(folder, write_tiny_bert(folder / "encoder")),
            "moe": write_prepared_texts(folder / "moe", write_tiny_deepseek(folder / "moe/encoder", ["a good film", "a bad film"])),
        }

    def complete(self, case: Case) -> Case:
        return replace(case, arguments=self._arguments[case.subfolder]) if case.job == TEXT else case


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts(tmp_path_factory.mktemp("strategies"))


class Ran(dict[int, Path]):
    """Number of ranks -> the folder with what came of them; run when first asked for."""

    def __init__(self, texts: Texts):
        super().__init__()
        self._texts = texts

    def __missing__(self, num_ranks: int) -> Path:
        folder = self._texts.folder
        cases = [self._texts.complete(case) for case in (IN_TWO if num_ranks == 2 else IN_FOUR)]
        stepper, optimizer = tried.started("ddp", folder, RankGroup())
        for index in range(2):
            tried.step(stepper, optimizer, index)
        runs = [(run_cases, (cases,)), (tried.pass_on, ()), (tried.take_whole, (stepper.state_tensors(optimizer),)), (tried.poison, ())]
        if num_ranks == 2:
            more = (tried.compute_in_bf16, tried.drop_values, tried.build_unlike_models, tried.choose_for_small_devices)
            runs += [(run, ()) for run in more]
        # Before they run: what fails in the ranks is not run again for each test.
        self[num_ranks] = folder
        in_ranks(num_ranks, folder, run_all, runs)
        return folder


@pytest.fixture(scope="session")
def ran(texts: Texts) -> dict[int, Path]:
    return Ran(texts)
