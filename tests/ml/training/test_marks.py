import time

import pytest
import torch

from ml.training.marks import Marks


def test_marks_on_a_processor():
    marks = Marks(torch.device("cpu"))
    time.sleep(0.02)
    marks.mark()
    marks.mark()
    first, second = marks.seconds()
    assert first >= 0.02
    assert 0 <= second < first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_marks_on_a_gpu_measure_the_work_and_not_its_start():
    device = torch.device("cuda")
    matrix = torch.rand(4096, 4096, device=device)
    (matrix @ matrix).sum().item()
    marks = Marks(device)
    started = time.perf_counter()
    for _ in range(50):
        matrix = matrix @ matrix / 4096
    launched = time.perf_counter() - started
    marks.mark()
    assert marks.seconds()[0] > 2 * launched
