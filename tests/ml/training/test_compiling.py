import functools
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ml.training.compiling import compile_in_place, has_compiler, keep_compiled_code_in, try_compiled, undo_compile

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(ids))).mean(1))


def test_a_model_that_cannot_be_compiled_runs_as_it_is_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = Network()
    ids = torch.arange(6).reshape(2, 3)
    before = model(ids)

    def run() -> None:
        raise RuntimeError("the compiler is not well\nand says much more")

    reason = try_compiled(model, run)
    assert reason == "the model could not be compiled (RuntimeError: the compiler is not well) and runs as it is"
    assert reason in caplog.text
    assert model._compiled_call_impl is None
    assert torch.equal(model(ids), before)


@pytest.mark.slow
def test_what_the_compiler_itself_raises_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    model = Network()
    ids = torch.arange(6).reshape(2, 3)
    reason = try_compiled(model, lambda: model(ids).sum().backward())
    assert reason is not None
    assert "no such instruction" in reason
    assert model(ids).shape == (2, 2)


def test_compiled_code_is_kept_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "elsewhere")
    keep_compiled_code_in(tmp_path)
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == Path(os.environ["TRITON_CACHE_DIR"]).parent == tmp_path


def test_a_machine_without_a_compiler_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not has_compiler(CPU)
    assert has_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(CPU), reason="no C++ compiler")
def test_compiled_and_plain_model_are_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    keep_compiled_code_in(tmp_path)
    plain, compiled = Network(), Network()
    assert try_compiled(compiled, lambda: compiled(torch.arange(6).reshape(2, 3)).sum().backward()) is None
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    # Lengths that it has not seen.
    for length in (4, 7, 11):
        ids = torch.randint(0, 20, (3, length))
        for model in (plain, compiled):
            model.zero_grad()
            model(ids).square().sum().backward()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    undo_compile(compiled)
    model, counted = Network(), CompileCounter()
    model.compile(backend=counted, dynamic=True)
    for length in (4, 7, 11):
        model(torch.randint(0, 20, (3, length)))
    assert counted.frame_count == 1  # one compilation for all lengths


@pytest.mark.slow
def test_only_the_layers_that_are_given_are_compiled() -> None:
    model = Network()
    compile_in_place(model, [model.layer])
    assert model.layer._compiled_call_impl is not None
    assert model._compiled_call_impl is None
    undo_compile(model)
    assert model.layer._compiled_call_impl is None
