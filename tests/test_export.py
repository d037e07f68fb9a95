"""A student in the formats of stock diffusers computes what it computes here, without this library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import students
import tiny_models
import tiny_pipelines
import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.utils import logging
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import FULL, SD3, WAN
from torch import Tensor

import anyflow
from anyflow.patching.unwrap import unwrap

KINDS = (
    FULL,
    "lora",
    "lora, dropout",
    "dora",
    "rslora",
    "two adapters, both active",
    "published recipe",
    "embedders",
    "saved delta",
    "saved head",
    "peft lokr",
    "lycoris lokr",
    "lycoris lokr, decomposed",
    "lycoris loha, dropout",
    "lycoris diag-oft",
    "lycoris full",
)
# Merging rounds each weight once more than applying the adapter beside it, and AnyFlow's class sums (1 - g) e + g d
# where the patch sums e + g (d - e): units in the last place of float32, of latents of order 1, over four steps.
ROUNDING = 1e-5


def sampled(pipe: Any, steps: int = 4) -> Tensor:
    return tiny_pipelines.sample(pipe, "WanPipeline", steps=steps)


def stock_sample(directory: Path, steps: int = 4) -> Tensor:
    pipe = AnyFlowPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return sampled(pipe, steps)


def snapshot(held: Any, network: Any) -> dict[str, Tensor]:
    state = {f"model.{name}": tensor.clone() for name, tensor in held.state_dict().items()}
    return state | {f"network.{name}": p.clone() for name, p in (network.named_parameters() if network else ())}


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_samples_the_student(kind: str, tmp_path: Path) -> None:
    held, network, _ = students.trained(WAN, kind)
    pipe = tiny_pipelines.build_pipeline("WanPipeline", unwrap(held))
    before, modules = snapshot(held, network), list(held.modules())
    anyflow.export_pipeline(pipe, tmp_path / "exported")
    after = snapshot(held, network)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert list(held.modules()) == modules
    with anyflow.any_step(pipe):
        expected = sampled(pipe)
    found = stock_sample(tmp_path / "exported")
    assert (found - expected).abs().max() < ROUNDING < (found - sampled(pipe)).abs().max()


@pytest.mark.parametrize("deltatime_type", ["r", "t-r"])
@pytest.mark.parametrize("times", ["one for a sample", "one for a frame"])
def test_the_exported_model_is_the_patched_one(deltatime_type: str, times: str, tmp_path: Path) -> None:
    held, _, _ = students.trained(WAN, "published recipe")
    held.enable_flowmap_time_conditioning(0.3, deltatime_type)
    anyflow.export_pipeline(tiny_pipelines.build_pipeline("WanPipeline", held), tmp_path / "exported")
    stock = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "exported" / "transformer")
    assert (stock.config.gate_value, stock.config.deltatime_type) == (0.3, deltatime_type)
    inputs = tiny_models.inputs(WAN)
    t, r = torch.tensor([[900.0, 650.0], [400.0, 400.0]]), torch.tensor([[100.0, 300.0], [0.0, 200.0]])
    if times == "one for a sample":
        t, r = t[:, :1].expand(2, 2), r[:, :1].expand(2, 2)
        own_t, own_r = t[:, 0], r[:, 0]
    else:
        own_t, own_r = (x.repeat_interleave(tiny_models.wan_tokens(inputs) // 2, dim=1) for x in (t, r))
    with torch.no_grad():
        expected = tiny_models.call(held, WAN, inputs, own_t, own_r)
        hidden = inputs["hidden_states"].transpose(1, 2)
        found = stock(hidden, t, r, inputs["encoder_hidden_states"], return_dict=False)[0].transpose(1, 2)
    # Two units in the last place of the largest outputs, which are below 4: the blend and the order of the sums differ.
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [(None, 3.0), (FlowMatchEulerDiscreteScheduler(shift=5.0), 5.0), (FlowMatchEulerDiscreteScheduler(), 1.0)],
)
def test_shift(scheduler: Any, shift: float, tmp_path: Path) -> None:
    extra = {} if scheduler is None else {"scheduler": scheduler}
    held, _ = students.make(WAN, "lora")
    anyflow.export_pipeline(tiny_pipelines.build_pipeline("WanPipeline", held, **extra), tmp_path)
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["shift"] == shift


def test_bfloat16_keeps_its_dtypes_on_disk_and_samples_within_its_rounding(tmp_path: Path) -> None:
    held, _, _ = students.trained(WAN, "published recipe")
    with anyflow.any_step(pipe := tiny_pipelines.build_pipeline("WanPipeline", held)):
        exact = sampled(pipe)
    tiny_models.cast_like_loading(held, torch.bfloat16)
    with anyflow.any_step(pipe):
        ours = sampled(pipe)
    anyflow.export_pipeline(pipe, tmp_path / "exported")
    weights = load_file(tmp_path / "exported/transformer/diffusion_pytorch_model.safetensors")
    dtypes = {
        key: weights[f"condition_embedder.{key}.linear_1.weight"].dtype for key in ("time_embedder", "delta_embedder")
    }
    assert set(dtypes.values()) == {torch.float32} and weights["proj_out.weight"].dtype == torch.bfloat16
    stock = AnyFlowPipeline.from_pretrained(tmp_path / "exported", torch_dtype=torch.bfloat16)
    stock.set_progress_bar_config(disable=True)
    stock.text_encoder.float()  # as in ``pipe``: the transformer alone is compared
    noise = (ours.float() - exact).abs().max()
    assert (sampled(stock).float() - exact).abs().max() < 3 * noise


STOCK_ONLY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("anyflow", "anyflow_kernels"):
            raise ImportError(name + " is not for this process")
sys.meta_path.insert(0, Refuse())
try:
    import anyflow
except ImportError:
    pass
else:
    raise SystemExit("anyflow could be imported")
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
directory, target, steps = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(directory)
assert type(pipe).__name__ == "AnyFlowPipeline", type(pipe)
found = {}
for count in map(int, steps.split(",")):
    generator = torch.Generator().manual_seed(0)
    found[str(count)] = pipe(prompt="a red fox", output_type="latent", height=32, width=32, num_frames=5,
        max_sequence_length=16, num_inference_steps=count, generator=generator, return_dict=False)[0].contiguous()
assert not any(name.split(".")[0] in ("anyflow", "anyflow_kernels") for name in sys.modules)
save_file(found, target)
"""


def test_a_process_without_this_library(tmp_path: Path) -> None:
    held, _, _ = students.trained(WAN, "lycoris lokr")
    pipe = tiny_pipelines.build_pipeline("WanPipeline", held)
    anyflow.export_pipeline(pipe, tmp_path / "exported")
    command = [sys.executable, "-c", STOCK_ONLY, str(tmp_path / "exported"), str(tmp_path / "found"), "1,2,4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert result.returncode == 0, result.stderr
    for steps, found in load_file(tmp_path / "found").items():
        with anyflow.any_step(pipe):
            assert (found - sampled(pipe, int(steps))).abs().max() < ROUNDING


class TestRefusals:
    def refuse(self, pipe: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            anyflow.export_pipeline(pipe, tmp_path / "exported")
        assert not list(tmp_path.iterdir())

    def test_other_families(self, tmp_path: Path) -> None:
        pipe = tiny_pipelines.build_pipeline("StableDiffusion3Pipeline")
        anyflow.patch(pipe)
        self.refuse(pipe, "only Wan text-to-video", tmp_path)

    def test_stock_model(self, tmp_path: Path) -> None:
        self.refuse(tiny_pipelines.build_pipeline("WanPipeline"), "not patched", tmp_path)

    @pytest.mark.parametrize("config", [{"added_kv_proj_dim": 24, "image_dim": 16}, {"image_dim": 16}])
    def test_image_to_video(self, config: dict[str, Any], tmp_path: Path) -> None:
        model = tiny_models.build(WAN, **config)
        anyflow.patch(model)
        self.refuse(tiny_pipelines.build_pipeline("WanPipeline", model), "image_dim", tmp_path)

    def test_two_denoisers(self, tmp_path: Path) -> None:
        pipe = tiny_pipelines.build_pipeline("WanPipeline")
        pipe = WanPipeline(**{**pipe.components, "transformer_2": tiny_models.build(WAN, seed=1)}, boundary_ratio=0.5)
        anyflow.patch(pipe)
        self.refuse(pipe, "two denoisers", tmp_path)

    def test_a_shift_that_depends_on_the_resolution(self, tmp_path: Path) -> None:
        held, _ = students.make(WAN, "lora")
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        self.refuse(tiny_pipelines.build_pipeline("WanPipeline", held, scheduler=scheduler), "resolution", tmp_path)

    def test_another_scale_of_time(self, tmp_path: Path) -> None:
        held, _ = students.make(WAN, "lora")
        anyflow.AnyFlowDistiller(held, config={**students.CONFIG, "timestep_scale": 1.0})
        self.refuse(tiny_pipelines.build_pipeline("WanPipeline", held), "1.0 sigma", tmp_path)

    def test_what_is_there_stays(self, tmp_path: Path) -> None:
        held, _ = students.make(WAN, "lora")
        (tmp_path / "theirs").write_text("data")
        with pytest.raises(FileExistsError, match="not empty"):
            anyflow.export_pipeline(tiny_pipelines.build_pipeline("WanPipeline", held), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]

    def test_a_failed_export_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        held, _ = students.make(WAN, "lora")
        pipe = tiny_pipelines.build_pipeline("WanPipeline", held)

        def fail(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            anyflow.export_pipeline(pipe, tmp_path / "exported")
        assert not list(tmp_path.iterdir())


LORA_PIPELINES = {
    "WanPipeline": WAN,
    "FluxPipeline": "FluxTransformer2DModel",
    "StableDiffusion3Pipeline": SD3,
    "ZImagePipeline": "ZImageTransformer2DModel",
}


class TestLora:
    """``export_lora`` beside ``save_student``: what ``pipe.load_lora_weights`` finds is the adapter."""

    def student(self, name: str, **options: Any) -> Any:
        model = tiny_models.build(LORA_PIPELINES[name])
        anyflow.patch(model, gate_value=0.3)
        targets = r".*to_[qv]|.*(delta|t|time|timestep)_embedder\.(linear_[12]|mlp\.[02])"
        model.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 7, "target_modules": targets, **options}))
        torch.manual_seed(1)
        with torch.no_grad():
            for _, parameter in [*anyflow.trainable_parameters(model), *anyflow.delta_parameters(model)]:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def sampled(self, name: str, model: Any, patched: bool = True) -> Tensor:
        pipe = tiny_pipelines.build_pipeline(name, model)
        if not patched:
            return tiny_pipelines.sample(pipe, name)
        with anyflow.any_step(pipe):
            return tiny_pipelines.sample(pipe, name)

    @pytest.mark.parametrize("name", LORA_PIPELINES)
    @pytest.mark.parametrize("first", ["delta", "lora"])
    def test_a_patched_pipeline_samples_the_student(self, name: str, first: str, tmp_path: Path) -> None:
        model = self.student(name)
        anyflow.save_student(model, tmp_path)
        anyflow.export_lora(model, tmp_path)
        pipe = tiny_pipelines.build_pipeline(name)
        anyflow.patch(pipe)
        if first == "lora":
            pipe.load_lora_weights(tmp_path)
        anyflow.load_student(pipe.transformer, tmp_path, adapters=False)
        if first == "delta":
            pipe.load_lora_weights(tmp_path)
        with anyflow.any_step(pipe):
            found = tiny_pipelines.sample(pipe, name)
        assert torch.equal(found, self.sampled(name, model))

    @pytest.mark.parametrize(
        "options", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"to_q": 3}}], ids=str
    )
    def test_kinds_of_lora(self, options: dict[str, Any], tmp_path: Path) -> None:
        name = "StableDiffusion3Pipeline"
        model = self.student(name, **options)
        anyflow.save_student(model, tmp_path)
        anyflow.export_lora(model, tmp_path)
        pipe = tiny_pipelines.build_pipeline(name)
        anyflow.load_student(pipe.transformer, tmp_path, adapters=False)
        pipe.load_lora_weights(tmp_path)
        with anyflow.any_step(pipe):
            assert torch.equal(tiny_pipelines.sample(pipe, name), self.sampled(name, model))

    def test_a_stock_pipeline_has_the_part_of_the_base(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        name = "StableDiffusion3Pipeline"
        model = self.student(name)
        anyflow.export_lora(model, tmp_path)
        pipe = tiny_pipelines.build_pipeline(name)
        logging.enable_propagation()
        try:
            pipe.load_lora_weights(tmp_path)
        finally:
            logging.disable_propagation()
        assert "unexpected keys" in caplog.text and "delta_embedder" in caplog.text
        assert not hasattr(pipe.transformer.time_text_embed, "delta_embedder")
        assert torch.equal(tiny_pipelines.sample(pipe, name), self.sampled(name, model, patched=False))

    def test_the_header_has_alpha_and_no_expression(self, tmp_path: Path) -> None:
        path = anyflow.export_lora(self.student("StableDiffusion3Pipeline"), tmp_path)
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
            keys = list(file.keys())
        assert config["transformer.lora_alpha"] == 7 and isinstance(config["transformer.target_modules"], list)
        assert all(key.startswith("transformer.") and ".lora_" in key for key in keys)

    def test_a_trained_copy_of_the_delta_comes_with_the_student(self, tmp_path: Path) -> None:
        model = self.student("StableDiffusion3Pipeline", target_modules=["to_q"], modules_to_save=["delta_embedder"])
        anyflow.save_student(model, tmp_path)
        anyflow.export_lora(model, tmp_path)
        pipe = tiny_pipelines.build_pipeline("StableDiffusion3Pipeline")
        anyflow.load_student(pipe.transformer, tmp_path, adapters=False)
        pipe.load_lora_weights(tmp_path)
        assert torch.equal(students.output(pipe.transformer, SD3), students.output(model, SD3))

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("saved head", "proj_out"),
            ("peft lokr", "is a LOKR"),
            ("two adapters, one active", "name one of"),
            (FULL, "name one of"),
        ],
    )
    def test_what_no_lora_file_holds(self, kind: str, message: str, tmp_path: Path) -> None:
        held, _ = students.make(SD3, kind)
        with pytest.raises(ValueError, match=message):
            anyflow.export_lora(held, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_changed_scale(self, tmp_path: Path) -> None:
        model = self.student("StableDiffusion3Pipeline")
        model.set_adapters(["default"], [0.5])
        with pytest.raises(ValueError, match=r"0\.5 times its scale"):
            anyflow.export_lora(model, tmp_path)

    def test_one_of_two(self, tmp_path: Path) -> None:
        held, _, _ = students.trained(SD3, "two adapters, one active")
        path = anyflow.export_lora(held, tmp_path, adapter="second")
        assert any("to_k" in key for key in load_file(path)) and not any("to_v" in key for key in load_file(path))


def test_a_lora_file_that_matches_nothing_is_refused_by_the_loader(tmp_path: Path) -> None:
    path = anyflow.save_student(students.trained(SD3, "lora")[0], tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file({f"other.{key}": tensor for key, tensor in load_file(path).items()}, path, metadata)
    with pytest.raises(ValueError, match=r"unexpected: \['other\."):
        anyflow.load_student(tiny_models.build(SD3), tmp_path)
