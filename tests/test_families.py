"""Every promise of a patch, on every class that has a spec and every variant of it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig
from tiny_models import perturb_delta
from torch import Tensor, nn

import anyflow
from anyflow.families import EmbedderSite, find_spec
from anyflow.stages.forward import TERMS

pytestmark = pytest.mark.usefixtures("quiet_dependencies")

# Natively dual: forward does not do without the second time, so there is no call without r to compare with.
NATIVE = ("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel", "AceStepTransformer1DModel")
NATIVE_VARIANTS = (
    "Flux3Transformer2DModel:flow_map",
    "HunyuanImageTransformer2DModel:meanflow",
    "HunyuanVideo15Transformer3DModel:meanflow",
)
NEED_R = (*NATIVE, "Flux3Transformer2DModel:flow_map")
PATCHED = tuple(name for name in zoo.NAMES if name not in (*NATIVE, *NATIVE_VARIANTS))
# The pass of Wan Animate 2 that fills the cache of the reference runs at a fixed time, whatever it is given.
BLIND = ("WanAnimate2Transformer3DModel",)
# Flex attention: no backward on a CPU, and its block mask is compiled by inductor, which takes half a minute.
FORWARD_ONLY = (
    "Kandinsky6SRTransformer3DModel",
    "AnyFlowFARTransformer3DModel",
    "WanAnimate2Transformer3DModel:cached",
)
COMPILED_BY_STOCK = ("WanAnimate2Transformer3DModel:cached",)
# The stock forward rounds these times, or computes their sinusoid, in the dtype of the model.
EXACT = torch.tensor([0.5, 0.25, 0.125, 0.0625])  # 1, 1000 and 1 - of these are bfloat16 numbers
NARROW_SINUSOID = (
    "LongCatAudioDiTTransformer",
    "MiniMaxMusic3Transformer1DModel",
    "QwenImage21Transformer2DModel",
    "StableCascadeUNet",
)
AWKWARD = torch.tensor([0.937, 0.4503, 0.9051, 0.2037])  # and these are none
ROUNDING = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "Flux3Transformer2DModel",
    "ChromaTransformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "QwenImageTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "NucleusMoEImageTransformer2DModel",
    "BriaTransformer2DModel",
    "BriaFiboTransformer2DModel",
    "LongCatAudioDiTTransformer",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "MiniMaxMusic3Transformer1DModel",
    "StableCascadeUNet",
)
MODEL_DTYPE = (
    "HunyuanVideo15Transformer3DModel",
    "HunyuanImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "MiniMaxMusic3Transformer1DModel",
    "AceStepTransformer1DModel",
    "StableCascadeUNet",
)


class Case:
    """A tiny model with its inputs, and times for which the stock forward of its dtype is exact."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.dtype = name, dtype
        self.model = zoo.build(name, dtype)
        self.inputs = zoo.inputs(name, self.model, dtype)
        exact = dtype == torch.bfloat16 and zoo.class_of(name) in ROUNDING
        self.t = zoo.times(name, self.inputs, EXACT if exact else zoo.SIGMAS)
        if exact and zoo.class_of(name) in MODEL_DTYPE:
            self.t = self.t.to(dtype).float()
        self.r = zoo.times(name, self.inputs, zoo.LOWER)

    def stock_time(self) -> Tensor:
        narrow = self.dtype == torch.bfloat16 and zoo.class_of(self.name) in MODEL_DTYPE
        return self.t.to(self.dtype) if narrow else self.t

    def stock(self, model: Any = None) -> Tensor:
        with torch.no_grad():
            return zoo.call(self.model if model is None else model, self.name, fresh(self.inputs), self.stock_time())

    def __call__(self, r: Tensor | None, model: Any = None, t: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return zoo.call(
                self.model if model is None else model, self.name, fresh(self.inputs), self.t if t is None else t, r
            )


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """A cache that a forward writes to is not shared between two of them."""
    return {
        key: copy.deepcopy(value) if type(value).__name__.endswith("Cache") else value for key, value in inputs.items()
    }


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", PATCHED)
def test_identities(name: str, dtype: torch.dtype) -> None:
    """r = None, gate 0, and r = t with a fresh clone are the stock model; anything else is not."""
    case = Case(name, dtype)
    stock = case.stock()
    assert stock.isfinite().all()
    anyflow.patch(case.model)
    assert torch.equal(case.stock(), stock)
    narrow = dtype == torch.bfloat16 and zoo.class_of(name) in NARROW_SINUSOID
    levels = bool(zoo.VARIANTS.get(name, {}).get("levels"))
    if not narrow and not levels:
        for gate in (0.25, 0.3, 1.0):
            anyflow.patch(case.model, gate_value=gate)
            assert torch.equal(case(case.t), stock), gate
    perturb_delta(case.model)
    assert torch.equal(case.stock(), stock)
    moved = case(case.r)
    assert moved.isfinite().all()
    assert torch.equal(moved, case(case.t)) == (name in BLIND)
    anyflow.patch(case.model, deltatime_type="t-r")
    other = case(case.r)
    assert other.isfinite().all() and not torch.equal(other, moved)
    if not narrow:
        anyflow.patch(case.model, gate_value=0.0)
        assert torch.equal(case(case.r), stock)


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n not in COMPILED_BY_STOCK])
def test_copies_state_and_restoration(name: str) -> None:
    """deepcopy and pickle run their own weights; the state is that of stock with the delta embedders; unpatch."""
    case = Case(name)
    stock_class, stock_keys = type(case.model), set(case.model.state_dict())
    before = None if name in NEED_R else case.stock()
    anyflow.patch(case.model)
    assert isinstance(case.model, stock_class) and type(case.model).__name__ == stock_class.__name__
    assert "r_timestep" in inspect.signature(case.model.forward).parameters
    native = name in (*NATIVE, *NATIVE_VARIANTS)
    delta = {key for key, _ in anyflow.delta_parameters(case.model)}
    assert delta and all(p.requires_grad for _, p in anyflow.delta_parameters(case.model))
    assert set(case.model.state_dict()) == (stock_keys if native else stock_keys | delta)
    perturb_delta(case.model)
    output = case(case.r)
    copies = [copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))]
    for other in copies:
        assert torch.equal(case(case.r, other), output)
    with torch.no_grad():
        for parameter in copies[0].parameters():
            parameter.mul_(0.5)
    assert torch.equal(case(case.r), output)
    assert name in BLIND or not torch.equal(case(case.r, copies[0]), output)
    anyflow.unpatch(case.model)
    assert type(case.model) is stock_class and set(case.model.state_dict()) == stock_keys
    assert before is None or torch.equal(case.stock(), before)
    anyflow.unpatch(copies[1])
    assert type(copies[1]) is stock_class


def gradients(case: Case) -> dict[str, Tensor]:
    case.model.zero_grad()
    output = zoo.call(case.model, case.name, fresh(case.inputs), case.t, case.r)
    output.float().square().mean().backward()
    return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n not in (*FORWARD_ONLY, *BLIND)])
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    """Every delta parameter learns; running the blocks again in backward changes no gradient."""
    case = Case(name)
    anyflow.patch(case.model)
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients(case)
    for key, _ in anyflow.delta_parameters(case.model):
        assert key in plain and plain[key].isfinite().all() and plain[key].any(), key
    if not case.model._supports_gradient_checkpointing:
        return
    # The default function of two classes is called with keywords that it does not take, patched or not.
    case.model.enable_gradient_checkpointing(
        lambda function, *a, **k: torch.utils.checkpoint.checkpoint(function, *a, use_reentrant=False, **k)
    )
    if find_spec(zoo.class_of(name)).checkpointed:
        with pytest.raises(ValueError, match="disable gradient checkpointing"):
            gradients(case)
        return
    again = gradients(case)
    assert again.keys() == plain.keys()
    for key, gradient in plain.items():
        assert torch.equal(again[key], gradient), key


def test_checkpointing_refusal_leaves_stock_training_alone() -> None:
    case = Case("StableCascadeUNet")
    anyflow.patch(case.model)
    case.model.enable_gradient_checkpointing()
    case.model.train()
    zoo.call(case.model, case.name, case.inputs, case.t).square().mean().backward()


def first_layer(module: nn.Module) -> nn.Module:
    return next(m for m in module.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "RMSNorm")


def features_at(model: Any, layers: list[nn.Module], run: Any) -> list[Tensor]:
    """What enters the first layer of each delta embedder while ``run`` runs."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
        for layer in layers
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", [n for n in PATCHED if n not in (*BLIND, *COMPILED_BY_STOCK)])
def test_times_reach_the_sinusoid_in_float32(name: str) -> None:
    """Of a bfloat16 model: r and r + 1e-4 (in sigma) differ, and the features are those of the float32 model.

    The delta embedder is float32 here, so that what enters it has not been rounded. 1e-6 is the float32 rounding of a
    sine of order 1; the two runs compute it by the same instructions.
    """
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(name, dtype)
        anyflow.patch(case.model)
        if name == "MiniMaxMusic3Transformer1DModel":  # its features have weights, which the dtype rounds
            case.model.time_proj.weight.data = case.model.time_proj.weight.data.bfloat16().to(dtype)
        deltas = [case.model.get_submodule(site.delta) for site in case.model._flowmap.spec.sites]
        layers = [first_layer(delta.float()) for delta in deltas]
        facts = zoo.FACTS[zoo.class_of(name)]["time"]
        near = case.r + 1e-4 * facts["scale"]

        # The clone casts by its own dtype or is called with the model's; only its input matters here.
        def run(r: Tensor, case: Case = case) -> None:
            try:
                case(r)
            except RuntimeError as error:
                if "dtype" not in str(error):
                    raise

        seen[dtype] = [features_at(case.model, layers, lambda r=r: run(r)) for r in (case.r, near)]
    whole = find_spec(zoo.class_of(name)).sites[0].whole_times
    assert all(captured for of_dtype in seen.values() for captured in of_dtype)
    for wide, narrow in zip(seen[torch.float32], seen[torch.bfloat16], strict=True):
        for a, b in zip(wide, narrow, strict=False):
            # Krea 2 rounds the features itself; past the first channels, Chroma's are no times.
            a, b = (x[..., :4] if name.startswith("Chroma") else x for x in (a.to(b.dtype), b))
            torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    assert whole or any(not torch.equal(a, b) for a, b in zip(*seen[torch.bfloat16], strict=False))


@pytest.mark.parametrize("name", [*NATIVE[2:], *NATIVE_VARIANTS])
def test_native_times_reach_the_sinusoid_in_float32(name: str) -> None:
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(name, dtype)
        anyflow.patch(case.model)
        case.t = zoo.times(name, case.inputs)
        found: list[Tensor] = []
        for module in case.model.modules():
            if type(module).__name__ == "Timesteps":
                module.register_forward_hook(lambda _, __, output, found=found: found.append(output.clone()))
        case(case.r)
        case(case.r + 1e-4 * zoo.FACTS[zoo.class_of(name)]["time"]["scale"])
        seen[dtype] = found
    # The refiner of HunyuanVideo 1.5 and the constant time 0 of Flux3 are stock calls; all else is float32.
    wide = seen[torch.float32]
    matched = [any(torch.allclose(a, b, rtol=0, atol=1e-6) for b in wide) for a in seen[torch.bfloat16]]
    assert sum(matched) >= 4
    distinct = [a for a, ok in zip(seen[torch.bfloat16], matched, strict=True) if ok]
    assert len({tuple(a.flatten().tolist()) for a in distinct}) >= 3  # t, r, r + 1e-4


@pytest.mark.parametrize("name", ROUNDING)
def test_where_stock_rounds_the_patched_model_is_closer_to_float32(name: str) -> None:
    """At times that bfloat16 does not hold, r = t with a fresh clone: the same function of exact times.

    The float32 model has the weights of the bfloat16 one, so that times and activations are all that is rounded.
    """
    narrow, wide = Case(name, torch.bfloat16), Case(name)
    wide.model.load_state_dict(narrow.model.state_dict())
    patched = copy.deepcopy(narrow.model)
    anyflow.patch(patched)
    error = {"stock": 0.0, "patched": 0.0}
    for shift in torch.linspace(0.0, 0.0631, 6):
        narrow.t = wide.t = zoo.times(name, narrow.inputs, AWKWARD - shift)
        exact = embedding(wide, wide.model, None)
        error["stock"] += float((embedding(narrow, narrow.model, None) - exact).norm())
        error["patched"] += float((embedding(narrow, patched, narrow.t) - exact).norm())
    assert error["patched"] < error["stock"]


def embedding(case: Case, model: Any, r: Tensor | None) -> Tensor:
    """The output of the first time embedder in one forward."""
    spec = find_spec(zoo.class_of(case.name))
    path = spec.sites[0].embedder.replace("down_blocks.*.*", "down_blocks.0.1")
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output.float()))
    if r is None:
        case.stock(model)
    else:
        case(r, model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", NEED_R)
def test_native_second_time(name: str) -> None:
    """Driven through its own argument: r_timestep is that argument, and without it r = t."""
    case = Case(name)
    arg = find_spec(zoo.class_of(name)).native
    arg = "target_timestep" if arg is None else arg.arg
    with torch.no_grad():
        time = {zoo.FACTS[zoo.class_of(name)]["time"]["arg"]: case.t}
        stock = [zoo.flat(case.model(**case.inputs, **time, **{arg: r}, return_dict=False)) for r in (case.r, case.t)]
    record = anyflow.patch(case.model)
    assert "second time of the class itself" in str(record)
    assert torch.equal(case(case.r), stock[0]) and torch.equal(case(None), stock[1])
    with torch.no_grad():
        own = zoo.flat(case.model(**case.inputs, **time, **{arg: case.r}, return_dict=False))
    assert torch.equal(own, stock[0])


# Data-dependent code of their own, patched or not.
STOCK_BREAKS = (
    "Cosmos3OmniTransformer:sound_and_action",
    "Flux2Transformer2DModel:kv_extract",
    "HiDreamImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideo15Transformer3DModel:meanflow",
    "Lumina2Transformer2DModel",
    "OmniGenTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "QwenImage21Transformer2DModel:plain",
    "WanAnimate2Transformer3DModel",
)


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if n not in (*STOCK_BREAKS, *COMPILED_BY_STOCK)])
def test_compiles_whole_and_once(name: str) -> None:
    """One graph, and no other for other times and gates."""
    torch._dynamo.reset()
    case = Case(name)
    anyflow.patch(case.model)
    perturb_delta(case.model)
    eager = case(case.r)  # which also fills the tables that some models make in their first forward
    compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True, dynamic=False)
    # aot_eager reorders nothing but decomposes some operations: 1e-5 of the largest value is float32 rounding.
    torch.testing.assert_close(case(case.r, compiled), eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))
    with torch.compiler.set_stance("fail_on_recompile"):
        case(0.8 * case.r, compiled, t=0.9 * case.t)
        case.model.enable_flowmap_time_conditioning(gate_value=0.7)
        case(case.r, compiled)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", STOCK_BREAKS)
def test_breaks_no_graph_that_stock_does_not(name: str) -> None:
    """Where the stock forward has data-dependent code, it is that code, not ours, that does not compile whole."""
    for patched in (False, True):
        torch._dynamo.reset()
        case = Case(name)
        if patched:
            anyflow.patch(case.model)
        case(None if name not in NEED_R else case.r)
        compiled = torch.compile(case.model, backend="eager", fullgraph=True, dynamic=False)
        r = case.r if patched else None
        with pytest.raises(Exception) as caught:  # noqa: PT011 (dynamo has several kinds)
            case(r, compiled)
        trace = str(caught.value)
        assert "/diffusers/models/" in trace[trace.rfind("/anyflow/") + 1 :]
    torch._dynamo.reset()


def split(name: str, case: Case) -> tuple[Tensor, Tensor | None]:
    """The latents among what forward takes, and the channels that the pipeline sets beside them."""
    spec = find_spec(zoo.class_of(name))
    given = case.inputs[spec.sample_arg]
    if isinstance(given, list):
        given = torch.stack([item.squeeze(1) if spec.sample_layout == "list" else item for item in given])
        given = given.squeeze(1) if spec.sample_layout == "batches" else given
    channels = {"MotifVideoTransformer3DModel": 16, "WanAnimateTransformer3DModel": 4}.get(name)
    if name == "Kandinsky6SRTransformer3DModel":
        return given[..., :4], given[..., 4:]
    return given[:, :channels], given[:, channels:] if channels else None


# What they predict has not the shape of what they are given: the images that are no target are in the same argument.
WITH_REFERENCES = ("ZImageTransformer2DModel:omni", "Flux2Transformer2DModel:kv_extract")
DISTILLED = tuple(n for n in zoo.NAMES if n not in (*FORWARD_ONLY, *BLIND, *COMPILED_BY_STOCK, *WITH_REFERENCES))


def batch_of(name: str, case: Case) -> dict[str, Any]:
    spec = find_spec(zoo.class_of(name))
    latents, beside = split(name, case)
    conditioning = {key: value for key, value in case.inputs.items() if key != spec.sample_arg}
    if beside is not None:
        conditioning[spec.sample_arg] = beside
    sigmas = zoo.SIGMAS[: len(latents)]
    if spec.times == "packed":
        conditioning[spec.timestep_arg] = torch.ones(case.t.shape)
        sigmas = sigmas[:1]
    elif case.t.ndim > 1:
        sigmas = spec.sigma(case.t)
    batch = {"latents": latents, "noise": torch.ones_like(latents), "sigmas": sigmas, "noisy_latents": latents}
    levels = zoo.VARIANTS.get(name, {}).get("levels", {})
    batch["conditioning"] = {**conditioning, **{arg: torch.ones(shape) for arg, shape in levels.items()}}
    return batch


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilling_step(name: str) -> None:
    """Target, loss and gradient of a full-rank student whose teacher is the stock model, of every family.

    With one rollout step the target is the teacher's own velocity: what the stock model predicts.
    """
    case = Case(name)
    spec = find_spec(zoo.class_of(name))
    teacher, student = case.model, copy.deepcopy(case.model)
    batch, levels = batch_of(name, case), zoo.VARIANTS.get(name, {}).get("levels", {})
    latents, sigmas = batch["latents"], batch["sigmas"]
    with pytest.warns(UserWarning, match="teacher_rollout_steps=1"):
        one = anyflow.AnyFlowDistiller(teacher, student, config={"teacher_rollout_steps": 1})
    prepared = one.prepare_batch(batch)
    with torch.no_grad():
        time = {
            spec.timestep_arg: spec.model_time(sigmas).expand(case.t.shape) if case.t.ndim else spec.model_time(sigmas)
        }
        native = one.student.spec.native
        if native is not None and native.required:
            time[native.arg] = prepared["timesteps"]
            time[spec.timestep_arg] = prepared["timesteps"]
        highest = sigmas.amax(1) if sigmas.ndim > 1 else sigmas
        time |= {arg: spec.model_time(highest).expand(shape) for arg, shape in levels.items()}
        stock = teacher(**case.inputs, **time, return_dict=False)
        stock = stock if isinstance(stock, Tensor) else stock[0]
    stock = torch.cat([s.reshape(-1) for s in stock]) if isinstance(stock, list) else stock
    if spec.learned_sigma and stock.shape[1] == 2 * latents.shape[1]:
        stock = stock[:, : latents.shape[1]]
    if spec.predicts_text:
        stock = stock[:, -latents.shape[1] :]
    torch.testing.assert_close(prepared["target"].reshape(-1), stock.reshape(-1), rtol=1e-5, atol=1e-6)

    distiller = anyflow.AnyFlowDistiller(teacher, student, config={"teacher_rollout_steps": 3})
    loss, logs = distiller.training_step(batch)
    loss.backward()
    assert loss.isfinite() and 0 < logs["anyflow_interval"] < 1
    for key, parameter in anyflow.delta_parameters(student):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", DISTILLED)
def test_a_step_of_the_onpolicy_stage(name: str) -> None:
    """Loss and gradient of a step of every family: a full-rank student, the stock model as real score, a LoRA on it as
    the critic. The critic moves, the stock model does not; both are asked for instantaneous velocities."""
    case = Case(name)
    spec = find_spec(zoo.class_of(name))
    teacher, student = case.model, copy.deepcopy(case.model)
    anyflow.patch(student)
    targets = anyflow.lora_targets(student)
    teacher.requires_grad_(False)
    anyflow.add_critic(teacher, LoraConfig(r=2, target_modules=[n for n in targets if ".delta" not in f".{n}"]))
    config = {"target_mode": "onpolicy", "onpolicy_forward": "linear", "schedule_shift": 1.0, "simulation_steps": (4,)}
    distiller = anyflow.AnyFlowDistiller(teacher, student, config={**config, "critic_learning_rate": 1e-3})
    before = {key: value.detach().clone() for key, value in teacher.named_parameters()}
    calls: list[Any] = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    batch = batch_of(name, case)
    loss, logs = distiller.training_step({**batch, "r_sigmas": 0.4 * batch["sigmas"]})
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in logs.values())
    for key, parameter in anyflow.delta_parameters(student):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    moved = {key for key, value in teacher.named_parameters() if not torch.equal(value, before[key])}
    assert moved and moved <= {key for key, _ in distiller.critic.named_parameters()}  # type: ignore[union-attr]
    assert len(calls) == 3
    native = distiller.teacher.spec.native
    for kwargs in calls:
        if native is not None and native.required:
            assert torch.equal(kwargs[native.arg], kwargs[spec.timestep_arg])
        else:
            assert kwargs.get("r_timestep") is None and (native is None or kwargs.get(native.arg) is None)


WHOLE_TIMES = tuple(name for name in DISTILLED if any(s.whole_times for s in find_spec(zoo.class_of(name)).sites))
NO_FORWARD_MODE = ("HiDreamImageTransformer2DModel",)  # counts the tokens of its experts in numpy


@pytest.mark.parametrize("name", DISTILLED)
def test_a_step_of_the_forward_stage(name: str) -> None:
    """Loss and gradient of a step of every family, and its derivative along the path in forward mode, which a central
    difference comes near to. Random networks are not smooth over the usual gap, so it is narrower here: the wider where
    the fastest feature of the time turns by 1000, the narrower, where the network's rounding shows, by more."""
    case = Case(name)
    student = case.model
    batch = batch_of(name, case)
    del batch["noisy_latents"]
    batch["noise"] = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    batch["r_sigmas"] = 0.4 * batch["sigmas"]
    common = {"target_mode": "meanflow", "schedule_shift": 1.0, "fuse_guidance_scale": 1.0}
    distiller = anyflow.AnyFlowDistiller(student, config=common)
    perturb_delta(student, 0.1)
    loss, logs = distiller.training_step(batch)
    loss.backward()
    assert loss.isfinite() and 0 < logs["anyflow_interval"] < 1
    for key, parameter in anyflow.delta_parameters(student):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    drawn = distiller.prepare_batch({key: value for key, value in batch.items() if key != "r_sigmas"})
    sigma, r = drawn["anyflow_sigmas"], drawn["anyflow_r_sigmas"]
    assert drawn["target"].isfinite().all() and ((r >= 0) & (r <= sigma) & (sigma <= 1)).all()
    if name in WHOLE_TIMES:
        with pytest.raises(ValueError, match=r"derivative='jvp'.*central_difference"):
            anyflow.AnyFlowDistiller(student, config={**common, "derivative": "jvp"})
        return
    exact = anyflow.AnyFlowDistiller(student, config={**common, "derivative": "jvp"})
    if name in NO_FORWARD_MODE:
        with pytest.raises(NotImplementedError, match=r"derivative='jvp'.*central_difference"):
            exact.prepare_batch(batch)
        return
    forward = exact.prepare_batch(batch)[TERMS].derivative.u_plus
    errors = []
    for epsilon in (3e-6, 3e-4):
        object.__setattr__(distiller.config, "central_difference_epsilon", epsilon)
        derivative = distiller.prepare_batch(batch)[TERMS].derivative
        central = (derivative.u_plus - derivative.u_minus) / derivative.gap
        errors.append((central - forward).norm() / forward.norm())
    assert min(errors) <= 0.05, errors


FRAMEWISE = {  # sigmas that a batch may bring, and the frame or the tokens that stay clean
    "WanTransformer3DModel": ("frames", {}),
    "LTXVideoTransformer3DModel": ("tokens", {}),
    "Ideogram4Transformer2DModel": ("tokens", {}),
    "SkyReelsV2Transformer3DModel": ("frames", {"enable_diffusion_forcing": True}),
    "SanaVideoTransformer3DModel": ("frames", {}),
    "SanaWMTransformer3DModel": ("frames", {}),
    "AnyFlowTransformer3DModel": ("frames", {}),
    "CosmosTransformer3DModel": ("frames", {}),
}


@pytest.mark.parametrize("name", FRAMEWISE)
def test_clean_first_frame_and_intervals_of_their_own(name: str) -> None:
    """Image-to-video: the first frame (or token) has t = r = 0, the others intervals of their own; nothing divides."""
    case = Case(name)
    kind, extra = FRAMEWISE[name]
    spec = find_spec(name)
    latents = case.inputs["hidden_states"]
    if name == "CosmosTransformer3DModel":
        latents = latents.repeat(1, 1, 2, 1, 1)
    count = latents.shape[1] if kind == "tokens" else latents.shape[spec.frame_dim]
    sigmas = torch.linspace(0.0, 0.9, count).repeat(len(latents), 1)
    r = sigmas * torch.linspace(0.2, 0.8, count)
    batch = {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)),
        "sigmas": sigmas,
        "r_sigmas": r,
        "conditioning": {**{k: v for k, v in case.inputs.items() if k != "hidden_states"}, **extra},
    }
    student = copy.deepcopy(case.model)
    distiller = anyflow.AnyFlowDistiller(case.model, student, config={"teacher_rollout_steps": 4})
    prepared = distiller.prepare_batch(batch)
    index = (slice(None), 0) if kind == "tokens" or spec.frame_dim == 1 else (slice(None), slice(None), 0)
    assert torch.equal(prepared["noisy_latents"][index], latents[index])
    assert prepared["target"].isfinite().all()
    time, r_time = (spec.sigma(prepared[key]) for key in ("timesteps", "flowmap_r_timesteps"))
    per = time.numel() // sigmas.numel()  # patches of a frame
    for got, wanted in ((time, sigmas), (r_time, r)):
        torch.testing.assert_close(got.reshape(len(latents), count, per), wanted[..., None].expand(-1, -1, per))
    loss, logs = distiller.training_step(batch)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(logs["anyflow_interval"], (sigmas - r).mean())
    for key, parameter in anyflow.delta_parameters(student):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


class TestRefusals:
    def test_sana_sprint(self) -> None:
        model = zoo.build("SanaTransformer2DModel:guidance", timestep_scale=1000.0)
        with pytest.raises(ValueError, match="TrigFlow"):
            anyflow.patch(model)
        assert not anyflow.is_patched(model)

    @pytest.mark.parametrize(
        ("pipeline", "name", "why"),
        [
            ("CosmosTextToWorldPipeline", "CosmosTransformer3DModel", "log"),
            ("CosmosVideoToWorldPipeline", "CosmosTransformer3DModel", "log"),
            ("Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", "preconditioned"),
            ("Cosmos2VideoToWorldPipeline", "CosmosTransformer3DModel", "preconditioned"),
            ("SanaSprintPipeline", "SanaTransformer2DModel", "TrigFlow"),
        ],
    )
    def test_pipelines_whose_time_is_not_linear_in_sigma(self, pipeline: str, name: str, why: str) -> None:
        import diffusers

        stock = getattr(diffusers, pipeline)
        pipe = stock.__new__(stock)  # its other components have nothing to do with it
        pipe.__dict__["transformer"] = model = zoo.build(name)
        with pytest.raises(ValueError, match=why):
            anyflow.patch(pipe)
        assert not anyflow.is_patched(model)
        anyflow.patch(model)  # the bare class serves flow models as well
        with pytest.raises(ValueError, match=why), anyflow.any_step(pipe):
            pass

    def test_a_time_of_another_modality_without_its_own_r(self) -> None:
        case = Case("LTX2VideoTransformer3DModel:tokenwise")
        anyflow.patch(case.model)
        with pytest.raises(ValueError, match="does not fit"):
            case.model(**case.inputs, timestep=case.t, r_timestep=case.r, audio_timestep=case.t[:, 0])


@pytest.mark.parametrize(
    "name",
    [
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanImageTransformer2DModel",
    ],
)
@pytest.mark.usefixtures("own_registry")
def test_an_embedder_that_is_left_can_be_given_a_site(name: str) -> None:
    """The text refiner's own embedding of t, by a family of one's own."""
    refiner = "context_embedder.time_text_embed"
    spec = find_spec(name)
    site = EmbedderSite(f"{refiner}.timestep_embedder", f"{refiner}.time_proj")
    anyflow.register_family(dataclasses.replace(spec, class_name=f"{name} with refiner", sites=(*spec.sites, site)))
    case = Case(name)
    stock = case.stock()
    anyflow.patch(case.model, family=f"{name} with refiner")
    assert torch.equal(case(case.t), stock)
    case.model.get_submodule(f"{refiner}.delta_embedder").linear_2.weight.data.mul_(2.0)
    assert torch.equal(case.stock(), stock) and not torch.equal(case(case.t), stock)
    anyflow.unpatch(case.model)
    assert torch.equal(case.stock(), stock)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel:zero_cond_t", "QwenImage21Transformer2DModel"])
def test_one_time_and_an_r_for_each_sample(name: str) -> None:
    """t of one element means the same t for all rows, and the rows of fixed times stay behind those of the batch."""
    case = Case(name)
    anyflow.patch(case.model)
    perturb_delta(case.model)
    inputs = {
        key: torch.cat([value] * 2) if isinstance(value, Tensor) and len(value) == 1 else value
        for key, value in case.inputs.items()
    }
    inputs["img_shapes"] = [inputs["img_shapes"][0]] * 2
    t, r = case.t[:1], torch.tensor([0.3, 0.1])
    with torch.no_grad():
        given = zoo.call(case.model, name, inputs, t, r)
        expanded = zoo.call(case.model, name, inputs, t.expand(2), r)
    assert torch.equal(given, expanded)


def test_one_r_over_the_tokens_of_a_sample_leaves_clean_ones_at_t() -> None:
    case = Case("WanTransformer3DModel:tokenwise")
    anyflow.patch(case.model)
    perturb_delta(case.model)
    t = case.t.clone()
    t[:, :3] = 0.0
    r = torch.where(t > 300.0, 300.0, t)
    assert torch.equal(case(torch.tensor([300.0]), t=t), case(r, t=t))


@pytest.mark.parametrize("key", ["timestep", "r_timestep"])
def test_times_in_the_conditioning_are_refused(key: str) -> None:
    case = Case("WanTransformer3DModel")
    conditioning = {"encoder_hidden_states": case.inputs["encoder_hidden_states"], key: case.t}
    latents = case.inputs["hidden_states"]
    batch = {"latents": latents, "noise": latents, "sigmas": torch.tensor([0.5]), "conditioning": conditioning}
    student = copy.deepcopy(case.model)
    distiller = anyflow.AnyFlowDistiller(case.model, student, config={"teacher_rollout_steps": 2})
    with pytest.raises(ValueError, match=key):
        distiller.prepare_batch(batch)


FUSED = [name for name in PATCHED if ":" not in name and find_spec(name).sites[0].sinusoid is None]


@pytest.mark.parametrize("name", FUSED)
def test_layerwise_casting_after_patching(name: str) -> None:
    """Where the source embedder is exempt from one-byte storage, so is its trainable clone."""
    case = Case(name)
    stock_patterns = case.model._skip_layerwise_casting_patterns
    anyflow.patch(case.model)
    expected = case(case.r)
    (site, *_) = case.model._flowmap.spec.sites
    case.model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    dtypes = [{p.dtype for p in case.model.get_submodule(path).parameters()} for path in (site.embedder, site.delta)]
    assert dtypes[0] == dtypes[1]
    # Weights of three bits are off by up to 6 %; a model that reads its storage as numbers is off by everything.
    output = case(case.r)
    assert output.isfinite().all() and (output - expected).norm() < 0.5 * expected.norm()
    again = zoo.build(name)
    anyflow.patch(again)
    anyflow.unpatch(again)
    assert again._skip_layerwise_casting_patterns == stock_patterns


def test_unpatching_that_cannot_be_finished_is_not_begun() -> None:
    case = Case("LongCatAudioDiTTransformer")
    anyflow.patch(case.model)
    output = case(case.r)
    layer = case.model.time_embed.time_mlp[0]
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="remove the hooks"):
        anyflow.unpatch(case.model)
    del layer.forward
    assert anyflow.is_patched(case.model) and torch.equal(case(case.r), output)
    anyflow.unpatch(case.model)


def test_after_accelerate_hooks_are_gone() -> None:
    from accelerate import cpu_offload_with_hook

    case = Case("SD3Transformer2DModel")
    stock = case.stock()
    _, hook = cpu_offload_with_hook(case.model, "cpu")
    hook.remove()
    anyflow.patch(case.model)
    _, hook = cpu_offload_with_hook(case.model, "cpu")
    hook.remove()
    anyflow.unpatch(case.model)
    assert torch.equal(case.stock(), stock)


def test_weights_assigned_to_a_model_made_on_the_meta_device() -> None:
    case = Case("SD3Transformer2DModel")
    anyflow.patch(case.model)
    perturb_delta(case.model)
    with torch.device("meta"):
        other = type(case.model).from_config(case.model.config)
        anyflow.patch(other)
    other.load_state_dict(case.model.state_dict(), assign=True)
    other.pos_embed.pos_embed = case.model.pos_embed.pos_embed  # a buffer that is not in the state
    assert torch.equal(case(case.r, other.eval()), case(case.r))


def test_a_teacher_of_a_class_that_only_the_student_was_given_a_family_for() -> None:
    case = Case("WanTransformer3DModel")

    class Derived(type(case.model)):  # type: ignore[misc]
        pass

    case.model.__class__ = Derived
    student = copy.deepcopy(case.model)
    anyflow.patch(student, family="WanTransformer3DModel")
    distiller = anyflow.AnyFlowDistiller(case.model, student, config={"teacher_rollout_steps": 2})
    assert distiller.teacher.spec.class_name == "WanTransformer3DModel"


def test_the_second_time_of_a_class_itself_is_part_of_the_base_model() -> None:
    case = Case("AceStepTransformer1DModel")
    case.model.requires_grad_(False)
    anyflow.patch(case.model)
    assert not anyflow.trainable_parameters(case.model)
    assert next(name for name, _ in anyflow.delta_parameters(case.model)).startswith("time_embed_r.")
