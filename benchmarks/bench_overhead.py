"""What a call of an operator costs on the host: its public function on rows of one element, whose work is nanoseconds.

Beside it what Python asks for less: a function that does nothing, and an ``autograd.Function`` that returns one new
element; and the plain PyTorch of the same formula. Run by ``make bench``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import anyflow_kernels
from anyflow_kernels import _library

from . import measure, operators
from .conftest import Session
from .measure import Samples, Variant
from .operators import FP32, Case

CALLS = 1000  # in one timed run
MODES = ("no grad", "with grad")  # the call alone; with grad it records what the backward needs
TINY = "one element a row"
CASES = (
    operators.embedding(TINY, 1, 2, 1, 1, FP32),
    operators.blend(TINY, 4, 1, FP32),
    operators.rollout(TINY, (4, 1), FP32),
    operators.interval(TINY, (4, 1), FP32),
    operators.loss(TINY, (4, 1), FP32),
    operators.distribution_matching(TINY, (4, 1), FP32),
)


class OneElement(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def nothing(*arguments: Any, **options: Any) -> None:
    pass


def call_of(case: Case, tensors: operators.Tensors) -> Callable[[Callable[..., Any]], Any]:
    """Calls a function with the arguments that the case gives to the public function of the operator."""
    with mock.patch.object(
        anyflow_kernels, case.operator_name, wraps=getattr(anyflow_kernels, case.operator_name)
    ) as seen:
        case.operator(tensors)
    (call,) = seen.call_args_list
    return lambda function: functools.partial(function, *call.args, **call.kwargs)


def variants(case: Case, tensors: operators.Tensors) -> dict[str, Callable[[], Any]]:
    with_arguments = call_of(case, tensors)
    return {
        "operator": with_arguments(getattr(anyflow_kernels, case.operator_name)),
        "a function that does nothing": with_arguments(nothing),
        "autograd.Function": functools.partial(OneElement.apply, *tensors.values()),
        "eager": functools.partial(case.eager, tensors),
    }


def repeated(call: Callable[[], Any], grad: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(CALLS):
                call()

    return run


def gate(case: Case, tensors: operators.Tensors) -> None:
    for found, expected in zip(case.operator(tensors), case.eager(tensors), strict=True):
        if not torch.allclose(found, expected.to(found), rtol=1e-4, atol=1e-5):  # of sums of a few float32
            raise measure.RedGate(f"operator: {found} is not the {expected} of plain PyTorch")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator_name)
def test_overhead(case: Case, mode: str, benchmark: Any, session: Session) -> None:
    if session.device != "cpu":
        pytest.skip("the host's part is measured where the host also does the work: --device cpu")
    tensors = case.make("cpu")
    with session.refused_when_red(case.name, mode):
        gate(case, tensors)
    calls = variants(case, tensors)
    timed = [Variant(name, repeated(call, mode == "with grad")) for name, call in calls.items()]
    pairs = [(variant, functools.partial(getattr, variant, "function")) for variant in timed]
    round_, samples = measure.interleaved(session.clock, pairs), Samples()
    benchmark.pedantic(round_, args=(samples,), rounds=session.rounds(round_()), iterations=1)
    microseconds = {
        name: {key: 1e6 * value / CALLS for key, value in measure.quartiles(samples.seconds[name]).items()}
        for name in calls
    }
    backends, _ = measure.backends(case.operator_name, "cpu")
    session.report(
        benchmark,
        kind="overhead",
        operator=case.operator_name,
        mode=mode,
        backend=next(name for name in _library.PREFERRED["cpu"] if name in backends),
        us=microseconds,
    )
