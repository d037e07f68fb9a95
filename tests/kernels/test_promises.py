"""What every operator promises on every backend, beyond the right numbers for the plain case."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from samples import DEVICE, OPERATORS, Sample, check_against_oracle, outputs_and_gradients, sample_inputs, upstream
from torch import Tensor

import anyflow_kernels

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TINY = {
    "gate_blend": {"size": (2, 3)},
    "rollout_step": {"size": (2, 3), "times": (2,)},
    "flowmap_embedding": {"channels": 4, "hidden": (3, 2), "width": 3},
    "interval_inputs": {"size": (2, 3), "times": (2,)},
    "flowmap_loss": {"size": (2, 3), "times": (2,)},
    "dmd_gradient": {"size": (2, 3), "times": (2,)},
}
EMPTY = {
    "gate_blend": {"size": (0, 7)},
    "rollout_step": {"size": (0, 3, 2), "times": (0,)},
    "flowmap_embedding": {"rows": (0,)},
    "interval_inputs": {"size": (0, 3, 2), "times": (0,)},
    "flowmap_loss": {"size": (0, 3, 2), "times": (0,)},
    "dmd_gradient": {"size": (0, 3, 2), "times": (0,)},
}
CHANGED = {  # tensors whose values change from step to step
    "gate_blend": ("gate",),
    "rollout_step": ("sigma", "sigma_next", "weight"),
    "flowmap_embedding": ("t", "r", "gate"),
    "interval_inputs": ("sigma", "sigma_plus", "sigma_minus"),
    "flowmap_loss": ("interval", "gap", "weight"),
    "dmd_gradient": ("sigma",),
}
ANOTHER = {  # an input beside the first
    "gate_blend": "delta",
    "rollout_step": "velocity",
    "flowmap_embedding": "delta_weight_2",
    "interval_inputs": "noise",
    "flowmap_loss": "u_plus",
    "dmd_gradient": "fake_velocity",
}

pytestmark = pytest.mark.parametrize("operator", OPERATORS)


def _results(sample: Sample) -> list[Tensor]:
    outputs, gradients = outputs_and_gradients(sample, sample.run)
    return [*outputs, *gradients.values()]


def _assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        assert torch.equal(f, e)


def test_gradcheck(backend: str, operator: str) -> None:
    if operator == "dmd_gradient":
        pytest.skip("its loss is not what its gradient is the derivative of: test_dmd_gradient.py has the derivative")
    sample = sample_inputs(operator, DEVICE, F64, True, **TINY[operator])
    names = sample.differentiable

    def function(*tensors: Tensor) -> list[Tensor]:
        outputs = sample.run(**{**sample.tensors, **dict(zip(names, tensors, strict=True))})
        return [o for o in outputs if o.requires_grad]

    fast = operator == "flowmap_embedding"  # one random direction instead of every weight by itself
    assert torch.autograd.gradcheck(function, [sample.tensors[n] for n in names], fast_mode=fast)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
def test_opcheck(backend: str, operator: str, requires_grad: bool) -> None:
    sample = sample_inputs(operator, DEVICE, F32, requires_grad, second_dtype=BF16, **TINY[operator])
    torch.library.opcheck(getattr(torch.ops.anyflow_kernels, operator).default, sample.raw(**sample.tensors))


def test_opcheck_of_the_backward(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, DEVICE, F32, second_dtype=BF16, **TINY[operator])
    raw, outputs = sample.raw(**sample.tensors), sample.run(**sample.tensors)
    grads = [torch.ones_like(o) for o in outputs]
    if operator == "gate_blend":
        arguments = (*grads, *raw, True)
    elif operator == "rollout_step":
        grad_average, grad_x, grad_input, _ = grads
        arguments = (grad_x, grad_average, grad_input, *raw[2:9], raw[0].dtype)
    elif operator == "flowmap_embedding":
        arguments = (*grads, *raw[:-1], True, True, True)
    elif operator == "interval_inputs":
        arguments = (*grads, *raw[2:5], raw[0].dtype, raw[1].dtype)
    elif operator == "flowmap_loss":
        arguments = (*grads, raw[1], *raw[7:10], raw[0].dtype)
    else:
        arguments = (grads[0], outputs[1], raw[0].dtype)
    torch.library.opcheck(getattr(torch.ops.anyflow_kernels, f"{operator}_backward").default, arguments)


def test_compiles_whole_and_once(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors: sample.run(**tensors), fullgraph=True, backend="aot_eager")
    expected = _results(sample)
    found, gradients = outputs_and_gradients(sample, lambda **tensors: compiled(tensors))
    _assert_equal([*found, *gradients.values()], expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for factor in (0.5, 0.25):
            other = sample.replaced(**{n: sample.tensors[n] * factor for n in CHANGED[operator]})
            found, gradients = outputs_and_gradients(other, lambda **tensors: compiled(tensors))
            _assert_equal([*found, *gradients.values()], _results(other))


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(tensor: Tensor) -> Tensor:
    padding = torch.full_like(tensor[..., :1], torch.nan)
    return torch.cat((padding, tensor, padding), -1)[..., 1:-1]


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


LAYOUTS = {"strided": _strided, "transposed": _transposed, "sliced": _sliced, "expanded": _expanded}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_of_any_layout(backend: str, operator: str, layout: Callable[[Tensor], Tensor]) -> None:
    sample = sample_inputs(operator, requires_grad=True)
    names = [n for n, t in sample.tensors.items() if t.ndim > 1 and t.numel() > 1] + [
        n
        for n in ("t", "r", "sigma", "sigma_plus", "weight", "interval", "gap", "base_bias_2")
        if n in sample.tensors and layout is not _transposed
    ]
    changed = sample.replaced(**{n: layout(sample.tensors[n].detach()) for n in names})
    assert any(not t.is_contiguous() for t in changed.tensors.values())
    check_against_oracle(changed)
    if operator != "flowmap_embedding":  # whose rows, expanded, are computed once, by another sum
        contiguous = sample.replaced(**{n: t.detach().contiguous() for n, t in changed.tensors.items()})
        _assert_equal(_results(changed), _results(contiguous))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_any_layout(backend: str, operator: str, layout: Callable[[Tensor], Tensor]) -> None:
    sample = sample_inputs(operator, requires_grad=True)
    outputs = sample.run(**sample.tensors)
    grads = [layout(g) for g in upstream(outputs)]
    if layout in (_strided, _expanded) or any(g.ndim > 1 for g in grads):
        assert not all(g.is_contiguous() for g in grads)
    _, found = outputs_and_gradients(sample, sample.run, grads)
    _, expected = outputs_and_gradients(sample, sample.run, [g.contiguous() for g in grads])
    for name, gradient in found.items():  # the reference adds in the order of the layout
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_through_cat_slice_transpose_and_expand(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, requires_grad=True)

    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        y = outputs[0]
        return (torch.cat((y.transpose(0, -1), y.transpose(0, -1)), 0)[1:] ** 2).sum() + y.expand(2, *y.shape).sum()

    names = sample.differentiable
    inputs = [sample.tensors[n] for n in names]
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(loss(sample.run(**sample.tensors)), inputs, **options)
    expected = torch.autograd.grad(loss(sample.formula(**sample.tensors)), inputs, **options)
    for name, f, e in zip(names, found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4, msg=name)


def test_empty_batch(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, requires_grad=True, **EMPTY[operator])
    outputs, gradients = outputs_and_gradients(sample, sample.run)
    assert all(o.numel() == 0 for o in outputs)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(sample.tensors[name])), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_runs_are_bit_equal(backend: str, operator: str, dtype: torch.dtype) -> None:
    sample = sample_inputs(operator, DEVICE, dtype, True)
    _assert_equal(_results(sample), _results(sample))


def test_inputs_are_neither_modified_nor_aliased(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, requires_grad=True)
    before = {n: t.detach().clone() for n, t in sample.tensors.items()}
    grads = upstream(sample.run(**sample.tensors))
    grads_before = [g.clone() for g in grads]
    outputs, gradients = outputs_and_gradients(sample, sample.run, grads)
    for name, tensor in sample.tensors.items():
        assert torch.equal(tensor, before[name]), name
    _assert_equal(grads, grads_before)
    inputs = {t.untyped_storage().data_ptr() for t in (*sample.tensors.values(), *grads)}
    if operator == "rollout_step":  # average enters as a sum: its gradient is the one that arrived
        del gradients["average"]
    for result in (*outputs, *gradients.values()):
        assert result.untyped_storage().data_ptr() not in inputs


def test_autocast_changes_nothing(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, requires_grad=True)
    expected = _results(sample)
    with torch.autocast(DEVICE, dtype=BF16):
        _assert_equal(_results(sample), expected)


def test_forward_mode_is_refused(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, **TINY[operator])
    name = "t" if operator == "flowmap_embedding" else ANOTHER[operator]
    with pytest.raises(NotImplementedError, match=f"{operator} has no forward-mode derivative"):
        torch.func.jvp(
            lambda value: sample.run(**{**sample.tensors, name: value}),
            (sample.tensors[name],),
            (torch.ones_like(sample.tensors[name]),),
        )


def test_reference_has_a_forward_mode(operator: str) -> None:
    sample = sample_inputs(operator, **TINY[operator])
    reference = getattr(__import__(f"anyflow_kernels.{operator}.reference", fromlist=["_"]), operator)
    raw = sample.raw(**sample.tensors)
    _, tangents = torch.func.jvp(lambda first: reference(first, *raw[1:]), (raw[0],), (torch.ones_like(raw[0]),))
    first = tangents if isinstance(tangents, Tensor) else tangents[0]
    assert first.abs().max() > 0


def test_mixed_devices_are_named(operator: str) -> None:
    sample = sample_inputs(operator)
    name = ANOTHER[operator]
    with pytest.raises(ValueError, match=r"is on (cpu|cuda:0) and .* on meta"):
        sample.run(**{**sample.tensors, name: sample.tensors[name].to("meta")})


def test_meta_tensors_give_the_right_shapes(operator: str) -> None:
    sample = sample_inputs(operator, DEVICE, F32, second_dtype=BF16)
    expected = sample.run(**sample.tensors)
    found = sample.run(**{n: t.to("meta") for n, t in sample.tensors.items()})
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (e.shape, e.dtype, e.stride())


def test_activation_checkpointing(backend: str, operator: str) -> None:
    sample = sample_inputs(operator, requires_grad=True)
    expected = _results(sample)

    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(sample.run, **tensors, use_reentrant=False)

    outputs, gradients = outputs_and_gradients(sample, run)
    _assert_equal([*outputs, *gradients.values()], expected)


def test_public_name(operator: str) -> None:
    assert operator in anyflow_kernels.__all__
    assert getattr(anyflow_kernels, operator).__doc__.startswith(("y =", "x' =", "x_s =", "loss_b =", "gradient_b ="))
