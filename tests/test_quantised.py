"""Quantised time embedders: the clone is float and trains, or the order to use is told; the base stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import anyflow
from anyflow import AnyFlowDistiller
from anyflow.patching.clone import clone_embedder

HAS_AVX512BF16 = bnb.functional.has_avx512bf16()
SD3, Z_IMAGE = "SD3Transformer2DModel", "ZImageTransformer2DModel"
Quantise = Callable[[nn.Module, bool], None]  # of a model, and whether to leave the delta embedder out


def torchao(config: Any) -> Quantise:
    def quantise(model: nn.Module, keep_delta: bool) -> None:
        quantize_(model, config, lambda m, path: isinstance(m, nn.Linear) and not (keep_delta and "delta" in path))

    return quantise


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Quantise:
    def quantise(model: nn.Module, keep_delta: bool) -> None:
        for name, child in list(model.named_children()):
            if isinstance(child, nn.Linear):
                setattr(model, name, make(child))
            elif not (keep_delta and "delta" in name):
                quantise(child, keep_delta)

    return quantise


def four_bit(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return with_bias(layer, linear)


def eight_bit(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return with_bias(layer, linear)


def with_bias(layer: Any, linear: nn.Linear) -> nn.Module:
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return layer.to("cpu")  # quantises


class Packed(nn.Linear):
    """What some other library may store: bytes, of which nobody else knows the scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = float(linear.weight.abs().max()) / 127
        steps = (linear.weight.data / self.scale).round() + 128
        self.weight = nn.Parameter(steps.to(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) * self.scale, self.bias)


LIBRARIES = {
    "torchao int8": torchao(Int8WeightOnlyConfig()),
    "torchao float8": torchao(Float8WeightOnlyConfig()),
    "bitsandbytes 4 bit": replaced(four_bit),
    "bitsandbytes 8 bit": replaced(eight_bit),
}
ALL = {**LIBRARIES, "bytes": replaced(Packed)}


@pytest.fixture(autouse=True)
def plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs bitsandbytes lays 4 bit weights out anew at the first inference, and fails where layers are as
    narrow as the tiny models' are."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


def quantised(name: str, how: Quantise, keep_delta: bool = False, patch_first: bool = False) -> Any:
    model = tiny_models.build(name)
    model.requires_grad_(False)
    if patch_first:
        anyflow.patch(model)
    how(model, keep_delta)
    return model.eval()  # bitsandbytes computes otherwise in training


def arguments(name: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    return tiny_models.inputs(name), tiny_models.times(name, [0.9, 0.4]), tiny_models.times(name, [0.2, 0.1])


def check_that_it_trains(model: Any, name: str, prediction: Tensor, tolerance: float) -> None:
    inputs, t, r = arguments(name)
    with torch.no_grad():
        assert torch.equal(tiny_models.call(model, name, inputs, t), prediction)
        at_t = tiny_models.call(model, name, inputs, t, t)
    assert (at_t - prediction).abs().max() <= tolerance * prediction.abs().max()
    deltas = [parameter for _, parameter in anyflow.delta_parameters(model)]
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.requires_grad for p in deltas)
    optimizer = torch.optim.SGD(deltas, lr=1e-4)
    losses = []
    for _ in range(3):
        loss = tiny_models.call(model, name, inputs, t, r).square().sum()
        loss.backward()
        assert all(p.grad.any() for p in deltas)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    with torch.no_grad():
        assert torch.equal(tiny_models.call(model, name, inputs, t), prediction), "the base moved"


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("name", [SD3, Z_IMAGE])
def test_quantised_before_the_patch_the_clone_is_of_the_dequantised_weights(name: str, kind: str) -> None:
    model = quantised(name, LIBRARIES[kind])
    inputs, t, _ = arguments(name)
    with torch.no_grad():
        prediction = tiny_models.call(model, name, inputs, t)
    anyflow.patch(model)
    # The same weights in another kernel: what is left is rounding. Layers of 8 bit round their inputs to bytes as well.
    check_that_it_trains(model, name, prediction, tolerance=0.05 if kind == "bitsandbytes 8 bit" else 1e-5)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", [SD3, Z_IMAGE])
def test_quantised_after_the_patch_the_base_is_called(name: str, kind: str) -> None:
    inputs, t, _ = arguments(name)
    with torch.no_grad():
        prediction = tiny_models.call(quantised(name, ALL[kind]), name, inputs, t)
    model = quantised(name, ALL[kind], keep_delta=True, patch_first=True)
    # d has the weights from before: at r = t it is off by what the quantisation lost.
    check_that_it_trains(model, name, prediction, tolerance=0.05)


def test_bytes_that_nobody_can_unpack_are_refused() -> None:
    model = quantised(SD3, replaced(Packed))
    with pytest.raises(ValueError, match=r"timestep_embedder.linear_1.weight is quantised .*torch.uint8.* Patch first"):
        anyflow.patch(model)
    assert not anyflow.is_patched(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes 8 bit"])
def test_the_clone_has_the_dtype_of_the_model(kind: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(SD3, dtype=dtype)
    LIBRARIES[kind](model, False)
    anyflow.patch(model)
    assert {p.dtype for _, p in anyflow.delta_parameters(model)} == {dtype}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_quantised_delta_embedder_is_told(kind: str) -> None:
    model = quantised(SD3, LIBRARIES[kind], patch_first=True)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"delta_embedder.linear_1.weight is quantised and cannot be trained"):
        AnyFlowDistiller(model, config={"teacher_rollout_steps": 2})


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_lora_on_quantised_embedders_trains(kind: str) -> None:
    """The published recipe on a quantised base; the teacher is the quantised base to the bit."""
    model = quantised(SD3, LIBRARIES[kind], patch_first=True)
    inputs, t, _ = arguments(SD3)
    with torch.no_grad():
        prediction = tiny_models.call(model, SD3, inputs, t)
    model.add_adapter(LoraConfig(r=2, target_modules=anyflow.lora_targets(model)))
    distiller = AnyFlowDistiller(model, config={"teacher_rollout_steps": 2})
    batch = {
        "latents": inputs.pop("hidden_states"),
        "noise": torch.zeros(2, 4, 8, 8),
        "sigmas": torch.tensor([0.9, 0.4]),
        "conditioning": inputs,
    }
    optimizer = torch.optim.Adam([p for _, p in distiller.trainable_parameters()], lr=1e-2)
    for _ in range(2):
        distiller.training_step(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, t, _ = arguments(SD3)
    with anyflow.adapters.teacher_mode(model):
        assert torch.equal(tiny_models.call(model, SD3, inputs, t), prediction)
    with torch.no_grad():
        assert not torch.equal(tiny_models.call(model, SD3, inputs, t), prediction)


@pytest.mark.skipif(not HAS_AVX512BF16, reason="bitsandbytes lays weights out anew only on CPUs with AVX512-BF16")
def test_a_clone_of_4_bit_layers_that_have_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(128, 128))
    embedder = nn.Sequential(four_bit(plain[0])).eval()
    expected = clone_embedder(embedder, "embedder")
    with torch.no_grad():
        embedder(torch.randn(2, 128))
    assert embedder[0].weight.quant_state.packing_format_for_cpu
    clone = clone_embedder(embedder, "embedder")
    # That layout keeps the scales of its blocks in bfloat16.
    torch.testing.assert_close(clone[0].weight, expected[0].weight, rtol=2**-8, atol=0)
    assert embedder[0].weight.quant_state.packing_format_for_cpu  # it goes on as it was
