"""``flowmap_embedding`` against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE, check_against_oracle, outputs_and_gradients, sample_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow_kernels import EmbedderWeights, flowmap_embedding

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp64": (F64, F64),
    "fp32-bf16": (F32, BF16),
    "bf16-fp32": (BF16, F32),
}
ROWS = {"one row": (1,), "two rows": (2,), "few rows": (2, 3), "two row blocks": (35,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "no bias, no silu": {"bias": False, "with_silu": False},
    "odd sizes": {"channels": 63, "hidden": (33, 100), "width": 27},
    "t-r": {"deltatime_type": "t-r"},
    "r-t": {"deltatime_type": "r-t"},
    "sine first": {"flip": False},
    "shift": {"shift": 1.0},
    "float64 times": {"time_dtype": F64},
    "one channel": {"channels": 1},
    "late times": {"span": 1e5},
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_result_and_gradients(backend: str, dtypes: tuple[torch.dtype, torch.dtype], rows: tuple[int, ...]) -> None:
    sample = sample_inputs("flowmap_embedding", DEVICE, dtypes[0], True, second_dtype=dtypes[1], rows=rows)
    check_against_oracle(sample)


@pytest.mark.parametrize("rows", [(2,), (3,)], ids=["one launch", "two launches"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(backend: str, variant: dict[str, Any], rows: tuple[int, ...]) -> None:
    check_against_oracle(sample_inputs("flowmap_embedding", DEVICE, F32, True, rows=rows, **variant))


@pytest.mark.parametrize("rows", [(2,), (3,)], ids=["one launch", "two launches"])
def test_several_blocks_in_every_direction(backend: str, rows: tuple[int, ...]) -> None:
    sample = sample_inputs(
        "flowmap_embedding", DEVICE, F32, rows=rows, channels=300, hidden=(150, 70), width=130, time_dtype=F64
    )
    check_against_oracle(sample)


def test_times_of_two_dtypes(backend: str) -> None:
    sample = sample_inputs("flowmap_embedding", requires_grad=True)
    _, expected = outputs_and_gradients(sample, sample.run)
    _, found = outputs_and_gradients(sample.replaced(r=sample.tensors["r"].double()), sample.run)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("wanted", ["base", "delta", "gate"])
def test_gradients_of_a_part_are_those_of_the_whole(backend: str, wanted: str) -> None:
    sample = sample_inputs("flowmap_embedding", requires_grad=True)
    _, expected = outputs_and_gradients(sample, sample.run)
    for name, tensor in sample.tensors.items():
        tensor.requires_grad_(name.startswith(wanted))
    _, found = outputs_and_gradients(sample, sample.run)
    assert set(found) == {n for n in sample.tensors if n.startswith(wanted)}
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


def test_gradient_through_the_silu_alone(backend: str) -> None:
    sample = sample_inputs("flowmap_embedding", requires_grad=True)
    grads = [torch.zeros(3, 20), torch.ones(3, 20)]
    _, found = outputs_and_gradients(sample, sample.run, grads)
    _, expected = outputs_and_gradients(sample, sample.formula, grads)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


def test_the_features_are_those_of_the_formula_at_late_times(backend: str) -> None:
    """Two linear layers that pass the features through show them: at phases up to 1000 the last bits of the frequencies
    count. 24 bits of a phase of 1000 are 6e-5; times between the integers, so that nothing is exact by luck."""
    channels, times = 64, torch.tensor([999.7, 937.3, 1.1])
    eye = torch.eye(channels)
    weights = EmbedderWeights(eye, None, eye, None)
    y = flowmap_embedding(times, times, weights, weights, torch.zeros(1), num_channels=channels)
    half = torch.arange(channels // 2, dtype=F64)
    phase = times.double()[:, None] * 10000.0 ** (-half / (channels // 2))
    exact = torch.nn.functional.silu(torch.cat((phase.cos(), phase.sin()), -1))
    assert (y.double() - exact).abs().max() < 2 * 6e-5


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "anyflow_kernels" in str(func):
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("expanded", [(1, 5), (3, 1), (1, 1), (3, 5)], ids=str)
def test_equal_rows_are_computed_once(backend: str, expanded: tuple[int, int]) -> None:
    sample = sample_inputs("flowmap_embedding", rows=expanded)
    t, r = (sample.tensors[n].expand(3, 5) for n in ("t", "r"))
    with _Recorder() as recorder:
        found = sample.run(**{**sample.tensors, "t": t, "r": r})
    assert recorder.rows == [expanded[0] * expanded[1]]
    expected = sample.run(**sample.tensors)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e.expand(3, 5, -1))
        assert f.is_contiguous()


def test_the_blend_is_exact_where_the_embedders_agree(backend: str) -> None:
    sample = sample_inputs("flowmap_embedding")
    weights = {n: t for n, t in sample.tensors.items() if n.startswith("base")}
    weights |= {n.replace("base", "delta"): t for n, t in weights.items()}
    t = sample.tensors["t"]
    with_gate, without = (sample.run(t=t, r=t, gate=torch.tensor([g]), **weights)[0] for g in (0.3, 0.0))
    assert torch.equal(with_gate, without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(4)}, r"t and r must have one shape, got \(3,\) and \(4,\)"),
        ({"t": torch.zeros(3, dtype=BF16)}, "t must be float32 or float64, got torch.bfloat16"),
        ({"t": torch.zeros(3, requires_grad=True)}, "not differentiable in t"),
        ({"gate": torch.zeros(2)}, r"one element, got shape \(2,\)"),
        ({"base_weight_1": torch.zeros(24, 35)}, "the weights of base do not fit 36 channels"),
        ({"delta_bias_2": torch.zeros(19)}, "the weights of delta do not fit 36 channels"),
        ({"delta_weight_2": torch.zeros(21, 20), "delta_bias_2": torch.zeros(21)}, "base gives 20 channels, delta 21"),
        ({"base_bias_1": torch.zeros(24, dtype=F64)}, "torch.float32 weight with a torch.float64 bias"),
    ],
    ids=["rows", "bf16 times", "times gradient", "gate", "weight", "bias", "widths", "bias dtype"],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    sample = sample_inputs("flowmap_embedding", "cpu")
    with pytest.raises(ValueError, match=message):
        sample.run(**{**sample.tensors, **change})


def test_unknown_deltatime_type_is_named() -> None:
    sample = sample_inputs("flowmap_embedding", deltatime_type="r")
    base = EmbedderWeights(*(sample.tensors[f"base_{n}"] for n in ("weight_1", "bias_1", "weight_2", "bias_2")))
    t, gate = sample.tensors["t"], sample.tensors["gate"]
    with pytest.raises(ValueError, match="'s' is none of"):
        flowmap_embedding(t, t, base, base, gate, num_channels=36, deltatime_type="s")
