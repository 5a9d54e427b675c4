"""Every problem's launchers run on its toy, as they do under compute-sanitizer on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tools.problems import PROBLEMS, Problem

CASES = [
    pytest.param(problem, channels_last, id=" ".join((*key, *["channels last"] * channels_last)))
    for key, problem in PROBLEMS.items()
    for channels_last in problem.formats
]


def tensors_of(results: Any) -> Iterator[torch.Tensor]:
    """The tensors that a launcher returns: one, or a tuple with None for what is not computed."""
    if isinstance(results, tuple):
        for result in results:
            yield from tensors_of(result)
    elif results is not None:
        yield results


# The interpreter takes some three minutes a dtype.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("problem", "channels_last"), CASES)
def test_a_toy_runs_both_ways_and_every_number_is_written(
    problem: Problem, channels_last: bool, dtype: torch.dtype, device: str, poisoned: None
) -> None:
    calls = problem.calls(dtype, channels_last, device, toy=True)
    for call in filter(None, (calls.forward, calls.backward)):
        results = list(tensors_of(call()))
        assert results and all(result.isfinite().all() for result in results)
        assert max(result.numel() for result in results) > 1


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=map(" ".join, PROBLEMS))
def test_a_toy_has_the_axes_of_the_problem_and_fewer_elements(problem: Problem) -> None:
    arguments = torch.bfloat16, problem.formats[0]
    toy, whole = problem.calls(*arguments, toy=True), problem.calls(*arguments)
    assert len(problem.toy) == len(problem.shape)
    assert toy.elements < whole.elements / 100
    assert all(small < large / 100 for small, large in zip(toy.floor, whole.floor))
