"""The promises of a patch, on every family: what stays, what changes, what survives, what comes back."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import tiny_models
import torch
from diffusers.models.embeddings import Timesteps
from needs import needs_extension
from peft import LoraConfig, get_peft_model
from tiny_models import perturb_delta
from torch import Tensor, nn

import anyflow
import anyflow_kernels
from anyflow.families import EmbedderSite, FamilySpec, find_spec

NAMES = tiny_models.NAMES
SIGMAS, LOWER = [0.937, 0.4503], [0.3, 0.11]
EXACT_SIGMAS = [0.5, 0.25]  # 500 and 250 are bfloat16 numbers
LORA = {"WanTransformer3DModel": ["to_q", "to_v"], "UNet2DConditionModel": ["to_q", "to_v"]}
# Flux rounds t to the model's dtype inside forward; the others keep it in float32.
ROUNDS_TIME = {"FluxTransformer2DModel", "FluxTransformer2DModel:guidance"}


def setup(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Tensor, Tensor]:
    model = tiny_models.build(name, dtype=dtype)
    return model, tiny_models.inputs(name, dtype=dtype), *(tiny_models.times(name, s) for s in (SIGMAS, LOWER))


def call(model: Any, name: str, inputs: Any, t: Tensor, r: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return tiny_models.call(model, name, inputs, t, r)


def sites(model: Any) -> tuple[EmbedderSite, ...]:
    return find_spec(type(model).__name__).sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
class TestIdentities:
    def test_without_r_the_model_is_stock(self, name: str, dtype: torch.dtype) -> None:
        model, inputs, t, _ = setup(name, dtype)
        stock = call(model, name, inputs, t)
        anyflow.patch(model)
        perturb_delta(model)
        assert torch.equal(call(model, name, inputs, t), stock)

    def test_gate_zero_is_stock(self, name: str, dtype: torch.dtype) -> None:
        if name in ROUNDS_TIME and dtype != torch.float32:
            # The stock model sees the rounded time, the patched one the exact one: see TestRounding.
            t_exact = tiny_models.times(name, EXACT_SIGMAS)
        else:
            t_exact = tiny_models.times(name, SIGMAS)
        model, inputs, _, r = setup(name, dtype)
        stock = call(model, name, inputs, t_exact)
        anyflow.patch(model, gate_value=0.0)
        perturb_delta(model)
        assert torch.equal(call(model, name, inputs, t_exact, r), stock)

    def test_r_equal_t_with_a_fresh_clone_is_stock(self, name: str, dtype: torch.dtype) -> None:
        """And so is an omitted r: a caller who knows nothing of r has the base model, and r = t, to the bit."""
        exact = name in ROUNDS_TIME and dtype != torch.float32
        model, inputs, _, _ = setup(name, dtype)
        t = tiny_models.times(name, EXACT_SIGMAS if exact else SIGMAS)
        stock = call(model, name, inputs, t)
        for gate in (0.25, 0.3, 1.0):
            anyflow.patch(model, gate_value=gate)
            assert torch.equal(call(model, name, inputs, t, t), stock)
            assert torch.equal(call(model, name, inputs, t), stock)

    @pytest.mark.parametrize("deltatime_type", ["r", "t-r"])
    def test_r_changes_the_output(self, name: str, dtype: torch.dtype, deltatime_type: str) -> None:
        model, inputs, t, r = setup(name, dtype)
        stock = call(model, name, inputs, t)
        anyflow.patch(model, deltatime_type=deltatime_type)
        conditioned = call(model, name, inputs, t, r)
        assert torch.isfinite(conditioned).all()
        assert not torch.equal(conditioned, stock)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_patch_warns_where_it_changes_the_model(name: str) -> None:
    """With type t-r the copied embedder sees 0 at r = t: another embedding, unless the gate is shut."""
    for deltatime_type, gate in (("r", 0.25), ("t-r", 0.25), ("t-r", 0.0)):
        model, inputs, t, _ = setup(name)
        stock = call(model, name, inputs, t)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            anyflow.patch(model, gate_value=gate, deltatime_type=deltatime_type)
            anyflow.patch(model, gate_value=gate, deltatime_type=deltatime_type)  # no fresh one: says nothing
        changes = deltatime_type == "t-r" and gate > 0
        assert ["changes the model before any training" in str(w.message) for w in caught] == [True] * changes
        assert torch.equal(call(model, name, inputs, t, t), stock) != changes
        assert torch.equal(call(model, name, inputs, t), stock)


class TestRounding:
    """Where a family rounds t to bfloat16, conditioning on r brings the model nearer to its float32 self."""

    @pytest.mark.parametrize("name", sorted(ROUNDS_TIME))
    def test_flux_in_bf16_is_closer_to_fp32_than_stock(self, name: str) -> None:
        # The network's own bf16 error is the same on both sides, so the embedding is compared, where only t differs.
        sigma = [0.998, 0.6015]  # 998 -> 1000, 601.5 -> 602 in bfloat16
        outputs = {}
        for dtype in (torch.float32, torch.bfloat16):
            for patched in (False, True):
                model = tiny_models.build(name, dtype=dtype)
                seen: list[Tensor] = []
                embedder = model.get_submodule(sites(model)[0].embedder)
                if patched:
                    anyflow.patch(model)
                embedder.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].float()))
                t = tiny_models.times(name, sigma)
                call(model, name, tiny_models.inputs(name, dtype=dtype), t, t if patched else None)
                outputs[dtype, patched] = seen[0]
        exact = outputs[torch.float32, False]
        error = {patched: (outputs[torch.bfloat16, patched] - exact).norm() for patched in (False, True)}
        assert torch.equal(outputs[torch.float32, True], exact)
        assert error[True] < 0.5 * error[False]

    @pytest.mark.parametrize("name", NAMES)
    def test_times_reach_the_sinusoid_in_float32(self, name: str) -> None:
        """t and r that are one in bfloat16 stay apart."""
        model = tiny_models.build(name, dtype=torch.bfloat16)
        anyflow.patch(model, gate_value=1.0)
        inputs = tiny_models.inputs(name, dtype=torch.bfloat16)
        t, near = tiny_models.times(name, [0.93700, 0.93700]), tiny_models.times(name, [0.9369, 0.9369])
        captured: list[Tensor] = []
        for site in sites(model):
            module = model.get_submodule(site.delta)
            first = next(m for m in module.modules() if isinstance(m, nn.Linear))
            first.register_forward_pre_hook(lambda _, a: captured.append(a[0].float()))
        call(model, name, inputs, t, t)
        call(model, name, inputs, t, near)
        assert not torch.equal(captured[0], captured[-1])

    @pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
    def test_features_are_those_of_the_exact_times(self, name: str) -> None:
        """The sinusoid of t and of r, against float64, in a bfloat16 model: also where stock divides by 1000."""
        for exact, rounded in ((937, 936), (833, 832), (750, 752), (998.39, 1000), (978.261, 976)):
            model = tiny_models.build(name, dtype=torch.bfloat16)
            anyflow.patch(model)
            seen: list[Tensor] = []
            model.time_text_embed.time_proj.register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
            model.time_text_embed.delta_embedder.linear_1.register_forward_pre_hook(lambda *_: None)  # not fused
            t, r = (tiny_models.times(name, [value / 1000] * 2) for value in (exact, exact / 2))
            call(model, name, tiny_models.inputs(name, dtype=torch.bfloat16), t, r)

            def sinusoid(value: float) -> Tensor:
                angles = value * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
                return torch.cat([angles.cos(), angles.sin()])

            assert (sinusoid(exact) - sinusoid(rounded)).abs().max() > 0.5
            for value in (exact, exact / 2):
                # Angles of up to 1000 are float32: 6e-5, twice rounded, and a sigma of 24 bits.
                assert any((f.double() - sinusoid(value)).abs().max() < 3e-4 and f.dtype == torch.float32 for f in seen)

    def test_small_times_are_times(self) -> None:
        """0.7 of 1000 is that, and no sigma; a unit time may be a little more than 1."""
        cases = (("SD3Transformer2DModel", [0.7, 0.4], 1.0), ("FluxTransformer2DModel", [1.0000001, 0.4], 1000.0))
        for name, times, scale in cases:
            model = tiny_models.build(name)
            anyflow.patch(model)
            seen: list[Any] = []
            model.time_text_embed.timestep_embedder.register_forward_pre_hook(
                lambda e, _, seen=seen: seen.append(e._flowmap_call.times[0])
            )
            for rows in (1, 2):
                t = torch.tensor(times[:rows])
                call(model, name, tiny_models.inputs(name, batch=rows), t, t)
                assert torch.equal(seen[-1].t, scale * t) and torch.equal(seen[-1].r, scale * t)


@pytest.mark.parametrize("name", NAMES)
class TestAutocast:
    def test_identities_hold(self, name: str) -> None:
        model, inputs, t, r = setup(name)
        if name in ROUNDS_TIME:
            t = tiny_models.times(name, EXACT_SIGMAS)
        with torch.autocast("cpu", torch.bfloat16):
            stock = call(model, name, inputs, t)
            anyflow.patch(model)
            assert torch.equal(call(model, name, inputs, t), stock)
            assert torch.equal(call(model, name, inputs, t, t), stock)
            assert not torch.equal(call(model, name, inputs, t, r), stock)

    def test_features_are_float32_and_distinct(self, name: str) -> None:
        """999.4 and 1000 are one number in bfloat16."""
        model = tiny_models.build(name)
        anyflow.patch(model, gate_value=1.0)
        inputs, seen = tiny_models.inputs(name), []
        delta = model.get_submodule(sites(model)[0].delta)
        first = next(m for m in delta.modules() if isinstance(m, nn.Linear))
        first.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        t = tiny_models.times(name, [1.0, 1.0])
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                call(model, name, inputs, t, tiny_models.times(name, [0.9994, 1.0]))
        assert seen[1].dtype == torch.float32 and not torch.equal(seen[1][0], seen[1][1])
        assert torch.allclose(seen[0], seen[1], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
class TestGradients:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_every_delta_parameter_gets_a_gradient(self, name: str, checkpointing: bool) -> None:
        model, inputs, t, r = setup(name)
        model.requires_grad_(False)
        anyflow.patch(model)
        if checkpointing:
            model.train()
            model.enable_gradient_checkpointing()
        tiny_models.call(model, name, inputs, t, r).square().sum().backward()
        for parameter_name, parameter in anyflow.delta_parameters(model):
            assert parameter.requires_grad, parameter_name
            assert parameter.grad is not None and parameter.grad.norm() > 0, parameter_name
        deltas = {id(p) for _, p in anyflow.delta_parameters(model)}
        assert all(p.grad is None for p in model.parameters() if id(p) not in deltas)

    def test_a_step_moves_the_delta_embedder_and_nothing_else(self, name: str) -> None:
        model, inputs, t, r = setup(name)
        model.requires_grad_(False)
        anyflow.patch(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        named = anyflow.trainable_parameters(model)
        assert [n for n, _ in named] == [n for n, _ in anyflow.delta_parameters(model)]
        tiny_models.call(model, name, inputs, t, r).square().sum().backward()
        torch.optim.SGD([p for _, p in named], lr=0.1).step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n, _ in named}

    def test_two_forwards_one_backward(self, name: str) -> None:
        """What DDP does to buffers between two forwards cannot touch the gate, which is none."""
        model, inputs, t, r = setup(name)
        anyflow.patch(model)
        assert not any("gate" in n for n, _ in [*model.named_buffers(), *model.named_parameters()])
        first = tiny_models.call(model, name, inputs, t, r)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())
        (first + tiny_models.call(model, name, inputs, t, 0.5 * r + 0.5 * t)).sum().backward()


@pytest.mark.parametrize("name", NAMES)
class TestRestoration:
    def test_undo_restores_class_keys_and_outputs(self, name: str) -> None:
        model, inputs, t, r = setup(name)
        stock, stock_class = call(model, name, inputs, t), type(model)
        keys, attributes = list(model.state_dict()), set(model.__dict__)
        embedders = [model.get_submodule(site.embedder) for site in sites(model)]
        classes = [type(embedder) for embedder in embedders]
        record = anyflow.patch(model)
        assert [k for k in model.state_dict() if "delta_embedder" not in k] == keys
        call(model, name, inputs, t, r)
        record.undo()
        assert type(model) is stock_class and [type(e) for e in embedders] == classes
        assert list(model.state_dict()) == keys and set(model.__dict__) == attributes
        assert torch.equal(call(model, name, inputs, t), stock)
        assert "r_timestep" not in inspect.signature(model.forward).parameters
        anyflow.unpatch(model)  # a stock model is left alone
        anyflow.patch(model)
        anyflow.unpatch(model)
        assert type(model) is stock_class

    def test_idempotent(self, name: str) -> None:
        model, inputs, t, r = setup(name)
        anyflow.patch(model)
        perturb_delta(model)
        once, keys = call(model, name, inputs, t, r), list(model.state_dict())
        anyflow.patch(model, gate_value=0.25)
        assert list(model.state_dict()) == keys and torch.equal(call(model, name, inputs, t, r), once)
        model.enable_flowmap_time_conditioning(gate_value=0.9, deltatime_type="t-r")
        assert not torch.equal(call(model, name, inputs, t, r), once)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_run_their_own_weights(self, name: str, how: str) -> None:
        model, inputs, t, r = setup(name)
        anyflow.patch(model)
        perturb_delta(model)
        expected = call(model, name, inputs, t, r)
        copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert anyflow.is_patched(copied) and torch.equal(call(copied, name, inputs, t, r), expected)
        with torch.no_grad():
            for _, parameter in anyflow.delta_parameters(copied):
                parameter.mul_(2)
        assert torch.equal(call(model, name, inputs, t, r), expected)
        assert not torch.equal(call(copied, name, inputs, t, r), expected)
        anyflow.unpatch(copied)
        assert anyflow.is_patched(model)

    def test_save_pretrained_keeps_the_stock_name(self, name: str, tmp_path: Any) -> None:
        model, *_ = setup(name)
        stock_class = type(model)
        anyflow.patch(model)
        model.save_pretrained(tmp_path)
        assert isinstance(model, stock_class) and f'"{stock_class.__name__}"' in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_once(name: str) -> None:
    """One graph, and none more when t, r or the gate change."""
    model, inputs, t, r = setup(name)
    anyflow.patch(model)
    perturb_delta(model)
    torch._dynamo.reset()
    call(model, name, inputs, t)  # Z-Image makes its rotary table in the first forward, which Dynamo cannot trace
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = call(compiled, name, inputs, t, r)
    assert torch.allclose(first, call(model, name, inputs, t, r), atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        call(compiled, name, inputs, 0.9 * t + 0.1 * r, 0.5 * r + 0.5 * t)
        anyflow.patch(model, gate_value=0.7)
        again = call(compiled, name, inputs, t, r)
    assert torch.allclose(again, call(model, name, inputs, t, r), atol=1e-5)
    assert not torch.allclose(again, first, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_forward_shows_r(name: str) -> None:
    model = tiny_models.build(name)
    stock_parameters = list(inspect.signature(model.forward).parameters)
    anyflow.patch(model)
    parameters = list(inspect.signature(model.forward).parameters)
    assert [p for p in parameters if p != "r_timestep"] == stock_parameters and "r_timestep" in parameters


def test_positional_times_and_forward_called_directly() -> None:
    model, inputs, t, r = setup("UNet2DConditionModel")
    anyflow.patch(model)
    expected = call(model, "UNet2DConditionModel", inputs, t, r)
    sample = inputs.pop("sample")
    with torch.no_grad():
        assert torch.equal(model.forward(sample, t, **inputs, r_timestep=r, return_dict=False)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_gate_survives_device_and_dtype_moves(name: str) -> None:
    model = tiny_models.build(name)
    anyflow.patch(model, gate_value=0.3)
    model.to(torch.bfloat16)
    assert model._flowmap_gate.dtype == torch.float32 and model._flowmap_gate.item() == torch.tensor(0.3).item()
    model.to("meta")
    assert model._flowmap_gate.device.type == "cpu"  # weights may be assigned next, which moves nothing else
    model.to_empty(device="cpu")
    assert model._flowmap_gate.item() == torch.tensor(0.3).item()


class TestTokenwise:
    def test_equal_tokens_equal_one_time_per_sample(self) -> None:
        name = "WanTransformer3DModel"
        model, inputs, t, r = setup(name)
        anyflow.patch(model)
        perturb_delta(model)
        tokens = tiny_models.wan_tokens(inputs)
        spread = call(model, name, inputs, t[:, None].repeat(1, tokens), r[:, None].repeat(1, tokens))
        # Another order of the sums in the modulation's matrix products: a few float32 ulps.
        assert torch.allclose(spread, call(model, name, inputs, t, r), atol=2e-6)

    def test_clean_tokens_keep_r_equal_t(self) -> None:
        name = "WanTransformer3DModel"
        model, inputs, t, _ = setup(name)
        stock_time = t[:, None].repeat(1, tiny_models.wan_tokens(inputs))
        stock_time[:, : stock_time.shape[1] // 2] = 0
        stock = call(model, name, inputs, stock_time)
        anyflow.patch(model)
        assert torch.equal(call(model, name, inputs, stock_time, stock_time), stock)


class TestZImage:
    name = "ZImageTransformer2DModel"

    def test_delta_time_is_positive_although_time_runs_backwards(self) -> None:
        model, inputs, t, r = setup(self.name)
        anyflow.patch(model, deltatime_type="t-r")
        seen: list[Tensor] = []
        model.get_submodule("delta_embedder").register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        call(model, self.name, inputs, t, r)
        expected = 1000 * (torch.tensor(SIGMAS) - torch.tensor(LOWER))
        # 1 - sigma rounds in float32: 6e-8 of 1, times 1000.
        assert torch.allclose(seen[0], expected, atol=2e-4)

    def test_further_calls_embed_a_fixed_time(self) -> None:
        """The second call of an omni forward is for clean images: both embedders see its own time, not r."""
        model, *_ = setup(self.name)
        embedder, t = model.t_embedder, torch.tensor([0.3])
        stock = embedder(1000 * torch.ones(1))
        anyflow.patch(model)
        from anyflow.patching.model import begin

        begin(model, model._flowmap.spec.sites[0], "blend", {}, {"t": (t, torch.tensor([0.9]))})
        flow, constant = embedder(1000 * t), embedder(1000 * torch.ones(1))
        assert torch.equal(constant, stock) and not torch.equal(flow, stock)
        with pytest.raises(RuntimeError, match="called 3 times"):
            embedder(t)


class TestUNetTimes:
    name = "UNet2DConditionModel"

    @pytest.mark.parametrize("form", ["python", "zero_dim", "int64"])
    def test_one_time_for_all_rows(self, form: str) -> None:
        model, inputs, _, _ = setup(self.name)
        anyflow.patch(model)
        t: Any = {"python": 937.0, "zero_dim": torch.tensor(937.0), "int64": torch.tensor(937)}[form]
        r: Any = {"python": 100.0, "zero_dim": torch.tensor(100.0), "int64": torch.tensor(100)}[form]
        rows = call(model, self.name, inputs, torch.tensor([937.0, 937.0]), torch.tensor([100.0, 100.0]))
        assert torch.equal(call(model, self.name, inputs, t, r), rows)


class TestAdapters:
    """Order with peft does not matter, and an adapter on the embedders is kept apart from their weights."""

    name = "SD3Transformer2DModel"
    targets = r".*attn\.to_[qv]|.*timestep_embedder\.linear_[12]|.*delta_embedder\.linear_[12]"

    @pytest.mark.parametrize("order", ["patch first", "adapter first"])
    @pytest.mark.parametrize("kind", ["add_adapter", "get_peft_model"])
    def test_either_order(self, order: str, kind: str) -> None:
        model, inputs, t, r = setup(self.name)
        stock = call(model, self.name, inputs, t)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"])
        held: Any = model
        if order == "patch first":
            anyflow.patch(model)
        if kind == "add_adapter":
            model.add_adapter(config)
        else:
            held = get_peft_model(model, config)
        if order == "adapter first":
            anyflow.patch(held)
        assert anyflow.is_patched(held)
        assert torch.equal(call(held, self.name, inputs, t, t), stock)
        named = anyflow.trainable_parameters(held)
        deltas = [n for n, _ in anyflow.delta_parameters(held)]
        assert set(deltas) < {n for n, _ in named}
        assert all(p.requires_grad for _, p in anyflow.delta_parameters(held))
        assert {n for n, _ in named} - set(deltas) == {n for n, _ in model.named_parameters() if "lora_" in n}
        tiny_models.call(held, self.name, inputs, t, r).sum().backward()
        assert all(p.grad is not None for _, p in named)

    def test_lora_on_both_embedders(self) -> None:
        model, inputs, t, r = setup(self.name)
        anyflow.patch(model)
        model.add_adapter(LoraConfig(r=2, target_modules=self.targets, init_lora_weights=False))
        stock = call(model, self.name, inputs, t)
        model.disable_lora()
        base = call(model, self.name, inputs, t, r)
        model.enable_lora()
        assert not torch.equal(stock, base)
        named = dict(anyflow.trainable_parameters(model))
        assert any("delta_embedder.linear_1.lora_A" in n for n in named)
        assert not any(n.endswith("delta_embedder.linear_1.base_layer.weight") for n in named)

    def test_clone_of_an_adapted_embedder_is_plain_and_merged(self) -> None:
        model, inputs, t, _ = setup(self.name)
        model.add_adapter(LoraConfig(r=2, target_modules=self.targets, init_lora_weights=False))
        adapted = call(model, self.name, inputs, t)
        anyflow.patch(model, gate_value=1.0)
        assert not any("lora" in n for n, _ in anyflow.delta_parameters(model))
        # Merging rounds each weight once more: a few float32 ulps in the output.
        assert torch.allclose(call(model, self.name, inputs, t, t), adapted, atol=1e-4)

    def test_modules_to_save(self) -> None:
        model, inputs, t, r = setup(self.name)
        anyflow.patch(model)
        held = get_peft_model(
            model, LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["delta_embedder", "timestep_embedder"])
        )
        before = call(held, self.name, inputs, t, r)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "modules_to_save" in n:
                    p.add_(0.1)
        assert not torch.equal(call(held, self.name, inputs, t, r), before)
        with held.disable_adapter():
            assert torch.equal(call(held, self.name, inputs, t, r), before)


class TestWrappers:
    name = "SD3Transformer2DModel"

    def test_ddp_is_unwrapped(self, tmp_path: Any) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model, inputs, t, r = setup(self.name)
            wrapped = nn.parallel.DistributedDataParallel(model)
            anyflow.patch(wrapped)
            first = tiny_models.call(wrapped, self.name, inputs, t, r)
            (first + tiny_models.call(wrapped, self.name, inputs, t, t)).sum().backward()
            assert all(p.grad is not None for _, p in anyflow.delta_parameters(wrapped))
        finally:
            torch.distributed.destroy_process_group()

    def test_fsdp2_after_patching(self, tmp_path: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model, inputs, t, r = setup(self.name)
            anyflow.patch(model)
            expected = call(model, self.name, inputs, t, r)
            mesh = init_device_mesh("cpu", (1,))
            for block in model.transformer_blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            output = tiny_models.call(model, self.name, inputs, t, r)
            assert torch.allclose(output, expected, atol=1e-6)
            output.sum().backward()
            assert all(p.grad is not None for _, p in anyflow.delta_parameters(model))
            with pytest.raises(ValueError, match="wrapped after it was patched"):
                anyflow.unpatch(model)
        finally:
            torch.distributed.destroy_process_group()

    def test_compiled_before_patching(self) -> None:
        model, inputs, t, r = setup(self.name)
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="aot_eager")
        stock = call(compiled, self.name, inputs, t)
        anyflow.patch(compiled)
        assert torch.allclose(call(compiled, self.name, inputs, t, t), stock, atol=1e-5)
        assert not torch.allclose(call(compiled, self.name, inputs, t, r), stock, atol=1e-5)

    def test_offloading_after_patching(self) -> None:
        from accelerate import cpu_offload

        model, inputs, t, r = setup(self.name)
        anyflow.patch(model)
        expected = call(model, self.name, inputs, t, r)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(call(model, self.name, inputs, t, r), expected)

    def test_layerwise_casting_after_patching(self) -> None:
        model, inputs, t, r = setup(self.name)
        anyflow.patch(model)
        expected = call(model, self.name, inputs, t, r)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert torch.isfinite(call(model, self.name, inputs, t, r)).all()
        assert not torch.equal(call(model, self.name, inputs, t, r), expected)

    @pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"])
    def test_fp8_storage_of_the_embedders(self, name: str) -> None:
        """No embedder is read by the fused op when its weights are storage only. (Stock Wan and Z-Image cast their
        features to the storage dtype and fail by themselves; diffusers keeps their embedders out of the casting.)"""
        from diffusers.hooks import apply_layerwise_casting

        model, inputs, t, r = setup(name)
        anyflow.patch(model)
        for site in sites(model):
            for path in (site.embedder, site.delta):
                apply_layerwise_casting(model.get_submodule(path), torch.float8_e4m3fn, torch.float32)
        assert torch.isfinite(call(model, name, inputs, t, r)).all()


@pytest.mark.usefixtures("own_registry")
class TestRefusals:
    def test_unknown_class_shows_how_to_write_a_spec(self) -> None:
        with pytest.raises(ValueError, match=r"no family 'Linear'[\s\S]*FamilySpec\(\s*class_name=\"Linear\""):
            anyflow.patch(nn.Linear(2, 2))

    def test_subclass_needs_its_family_named(self) -> None:
        model, *_ = setup("SD3Transformer2DModel")
        model.__class__ = type("MySD3", (type(model),), {})
        with pytest.raises(ValueError, match="MySD3"):
            anyflow.patch(model)
        anyflow.patch(model, family="SD3Transformer2DModel")
        assert anyflow.is_patched(model)

    def test_registered_family(self) -> None:
        class Embedder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x)

        class Toy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj, self.embed = Timesteps(8, True, 0), Embedder()

            def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
                return hidden_states + self.embed(self.proj(timestep))

        anyflow.register_family(FamilySpec("Toy", 1000.0, (EmbedderSite("embed", "proj"),)))
        toy = Toy()
        anyflow.patch(toy)
        x, t = torch.zeros(2, 4), torch.tensor([500.0, 20.0])
        assert torch.equal(toy(x, t, r_timestep=t), toy(x, t))
        assert "Toy" in anyflow.families()
        with pytest.raises(TypeError, match="FamilySpec"):
            anyflow.register_family("Toy")  # type: ignore[arg-type]

    def test_forward_in_which_no_embedder_saw_r(self) -> None:
        class Blind(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj, self.embed = Timesteps(8, True, 0), nn.Linear(8, 4)

            def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
                return hidden_states

        spec = FamilySpec("Blind", 1.0, (EmbedderSite("embed", "proj"),))
        anyflow.register_family(spec)
        blind = Blind()
        anyflow.patch(blind)
        with pytest.raises(RuntimeError, match="embed was not called with it"):
            blind(torch.zeros(1, 4), torch.ones(1), r_timestep=torch.zeros(1))

    def test_native_second_time(self) -> None:
        class Native(nn.Module):
            def forward(self, x: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
                return x

        anyflow.register_family(FamilySpec("Native", 1.0, (EmbedderSite("embed", None),)))
        with pytest.raises(ValueError, match="takes r_timestep by itself"):
            anyflow.patch(Native())

    @pytest.mark.parametrize("bad", [{"gate_value": 1.5}, {"gate_value": float("nan")}, {"deltatime_type": "r-t"}])
    def test_out_of_range(self, bad: dict[str, Any]) -> None:
        model, *_ = setup("SD3Transformer2DModel")
        with pytest.raises(ValueError, match=next(iter(bad))):
            anyflow.patch(model, **bad)
        assert not anyflow.is_patched(model)

    def test_hooked_and_quantised_models_name_the_order(self) -> None:
        from accelerate import cpu_offload

        model, *_ = setup("SD3Transformer2DModel")
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(ValueError, match="Patch first"):
            anyflow.patch(model)
        quantised, *_ = setup("SD3Transformer2DModel")
        linear = quantised.time_text_embed.timestep_embedder.linear_1
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(ValueError, match="uint8"):
            anyflow.patch(quantised)
        assert not anyflow.is_patched(quantised) and "delta" not in str(list(quantised.state_dict()))

    def test_shapes_and_devices_of_r(self) -> None:
        model, inputs, t, _ = setup("SD3Transformer2DModel")
        anyflow.patch(model)
        with pytest.raises(ValueError, match=r"\(3,\)"):
            call(model, "SD3Transformer2DModel", inputs, t, torch.zeros(3))
        with pytest.raises(ValueError, match="meta"):
            call(model, "SD3Transformer2DModel", inputs, t, torch.zeros(2, device="meta"))
        assert model.time_text_embed.timestep_embedder._flowmap_call is None

    def test_state_is_cleared_after_an_exception(self) -> None:
        model, inputs, t, r = setup("SD3Transformer2DModel")
        stock = call(model, "SD3Transformer2DModel", inputs, t)
        anyflow.patch(model)
        model.proj_out.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("boom")))
        with pytest.raises(KeyError, match="boom"):
            call(model, "SD3Transformer2DModel", inputs, t, r)
        model.proj_out._forward_pre_hooks.clear()
        assert torch.equal(call(model, "SD3Transformer2DModel", inputs, t), stock)

    def test_delta_parameters_of_a_stock_model(self) -> None:
        model, *_ = setup("SD3Transformer2DModel")
        with pytest.raises(ValueError, match="not patched"):
            list(anyflow.delta_parameters(model))
        with pytest.raises(TypeError, match="neither a model nor a pipeline"):
            anyflow.patch(object())


def test_record_tells_what_was_left() -> None:
    model, *_ = setup("FluxTransformer2DModel:guidance")
    text = str(anyflow.patch(model))
    assert "time_text_embed.delta_embedder" in text
    assert "left     time_text_embed.guidance_embedder: embeds the guidance scale" in text


def test_float32_rule_follows_the_source() -> None:
    model, *_ = setup("WanTransformer3DModel", torch.bfloat16)
    anyflow.patch(model)
    assert {p.dtype for _, p in anyflow.delta_parameters(model)} == {torch.float32}
    assert "delta_embedder" in model._keep_in_fp32_modules
    assert "delta_embedder" not in type(model)._keep_in_fp32_modules
    anyflow.unpatch(model)
    assert "delta_embedder" not in model._keep_in_fp32_modules


@needs_extension
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("ZImage")])  # its embedder is not fused
def test_whole_models_on_the_compiled_kernels(name: str) -> None:
    """At r = t with a fresh clone, and at r with another one, against the reference, which all other tests run on."""
    found = []
    for backend in ("reference", "native"):
        model, inputs, t, r = setup(name)
        anyflow.patch(model)
        with anyflow_kernels.use_backend(backend):
            fresh = call(model, name, inputs, t, t)
            perturb_delta(model)
            found.append((fresh, call(model, name, inputs, t, r)))
    for reference, native in zip(*found, strict=True):
        # float32 sums in another order, through a few layers: a hundred roundings of the largest value.
        torch.testing.assert_close(native, reference, rtol=0, atol=100 * 2**-24 * float(reference.abs().max()))
        assert native.isfinite().all()
