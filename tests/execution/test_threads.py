"""Threads of narrow passes and of torch: who uses how many, and for whom that holds."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from copyspec_engine import EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.execution.threads import _openmp_setter, one_torch_thread
from copyspec_engine.sampling import sampler
from copyspec_engine.sampling.gumbel import highest_perturbed
from copyspec_engine.testing import scripted_engine


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


needs_openmp = pytest.mark.skipif(_openmp_setter() is None, reason="torch computes with something else than OpenMP")


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_one_torch_thread_holds_for_the_calling_thread_alone_and_ends_with_its_block() -> None:
    elsewhere: list[int] = []

    def fails() -> None:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
            other.start()
            other.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert elsewhere == [2]
    assert torch.get_num_threads() == 2


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_a_step_chooses_its_tokens_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = set()

    def noted(*args: Any) -> torch.Tensor:
        chosen.add(torch.get_num_threads())
        return highest_perturbed(*args)

    with scripted_engine(["some words"], EngineConfig(model="scripted", device="cpu")) as engine:
        monkeypatch.setattr(sampler, "highest_perturbed", noted)
        params = SamplingParams(temperature=0.5, seed=1, max_tokens=3)
        engine.generate(GenerationRequest(prompt="Say some words.", sampling=params))
    assert chosen == {1}
    assert torch.get_num_threads() == 2
