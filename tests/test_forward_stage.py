"""The forward stage as a trainer meets it: draws and buckets, real networks, dropout, precision, refusals, resume."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import test_distiller as protocol
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn
from toy_flow import toy_stage

import anyflow
from anyflow import AnyFlowDistiller
from anyflow.adapters import frozen
from anyflow.families import find_spec
from anyflow.layout import TimeLayout
from anyflow.precision import float32_forward
from anyflow.stages.forward import TERMS
from anyflow.streams import RandomStreams
from anyflow.time import phase_of_draw, sample_intervals, unshift_sigma

SD3, WAN = "SD3Transformer2DModel", "WanTransformer3DModel"
MEANFLOW = {"target_mode": "meanflow", "schedule_shift": 3.0}
PLAIN = {**MEANFLOW, "fuse_guidance_scale": 1.0}


def batch_for(name: str, seed: int = 0, pair: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One sample of r < t and one of r = t; or none of their own."""
    batch = protocol.batch_for(name, (0.9, 0.4), seed)
    batch["negative_conditioning"] = protocol.batch_for(name, seed=5)["conditioning"]
    for key in ("conditioning", "negative_conditioning"):
        batch[key] = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch[key].items()
        }
    if pair:
        batch["r_sigmas"] = torch.tensor([0.3, 0.4])
    else:
        del batch["sigmas"]
    return batch


class TestBuckets:
    def draw(self, count: int, number: int, diffusion: float = 0.5, consistency: float = 0.25) -> Counter[str]:
        sigma, r = sample_intervals(
            count, diffusion, consistency, 3.0, phase_of_draw(number), torch.Generator().manual_seed(number)
        )
        assert ((r >= 0) & (r <= sigma) & (sigma > 0) & (sigma <= 1)).all()
        return Counter(
            "diffusion" if a == b else "consistency" if b == 0 else "rest" for a, b in zip(sigma, r, strict=True)
        )

    @pytest.mark.parametrize("count", [4, 8, 32])
    def test_whole_shares_are_exact_in_every_batch(self, count: int) -> None:
        for number in range(50):
            assert self.draw(count, number) == {
                "diffusion": count // 2,
                "consistency": count // 4,
                "rest": count // 4,
            }

    @pytest.mark.parametrize("ratios", [(0.5, 0.25), (0.7, 0.1), (1 / 3, 1 / 3)])
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_shares_in_the_long_run_at_any_batch_size(self, count: int, ratios: tuple[float, float]) -> None:
        """1000 batches; each is off by less than a sample in each bucket, and together they are within a percent."""
        total: Counter[str] = Counter()
        for number in range(1000):
            drawn = self.draw(count, number, *ratios)
            for bucket, ratio in zip(("diffusion", "consistency"), ratios, strict=True):
                assert abs(drawn[bucket] - ratio * count) < 1
            total += drawn
        for bucket, ratio in zip(("diffusion", "consistency"), ratios, strict=True):
            assert total[bucket] / (1000 * count) == pytest.approx(ratio, abs=0.01)

    def test_batches_of_one_accumulate_to_the_shares(self) -> None:
        """Any eight consecutive draws, as gradient accumulation sums them up."""
        for start in range(200):
            drawn = sum((self.draw(1, number) for number in range(start, start + 8)), Counter())
            assert abs(drawn["diffusion"] - 4) <= 1 and abs(drawn["consistency"] - 2) <= 1

    def test_every_place_in_the_batch_has_its_turn(self) -> None:
        counts = torch.zeros(4)
        for number in range(2000):
            sigma, r = sample_intervals(4, 0.5, 0.25, 1.0, phase_of_draw(number), torch.Generator().manual_seed(number))
            counts += sigma == r
        assert torch.allclose(counts / 2000, torch.tensor(0.5), atol=0.05)  # 4.5 standard deviations

    def test_two_uniform_draws_sorted_and_shifted_once(self) -> None:
        sigma, r = sample_intervals(100_000, 0.2, 0.2, 3.0, 0.3, torch.Generator().manual_seed(0))
        u, below = unshift_sigma(sigma, 3.0), unshift_sigma(r, 3.0)
        rest = (below > 0) & (below < u)
        # Of the larger and the smaller of two uniform numbers the means are 2/3 and 1/3, with a deviation of 1e-3.
        assert u.mean().item() == pytest.approx(2 / 3, abs=4e-3)
        assert below[rest].mean().item() == pytest.approx(1 / 3, abs=4e-3)
        assert u[rest].mean().item() == pytest.approx(2 / 3, abs=4e-3)


class TestDraws:
    def drawn(self, stage: Any, denoiser: Any, count: int = 4) -> tuple[Tensor, Tensor]:
        latents = torch.zeros(count, 2, 3, 3)
        batch = {"latents": latents, "noise": latents}
        return stage.times(batch, TimeLayout(denoiser.spec, denoiser.bare, latents))

    def test_ranks_of_one_context_parallel_group_draw_the_same(self) -> None:
        places = [toy_stage(torch.float32, streams=RandomStreams(0, dp_rank=rank // 2, dp_size=2)) for rank in range(4)]
        for _ in range(3):
            pairs = [torch.stack(self.drawn(*place)) for place in places]
            assert torch.equal(pairs[0], pairs[1]) and torch.equal(pairs[2], pairs[3])
            assert not torch.equal(pairs[0], pairs[2])

    def test_ranks_share_out_what_one_process_draws(self) -> None:
        whole = torch.stack(self.drawn(*toy_stage(torch.float32), count=8))
        parts = [
            torch.stack(self.drawn(*toy_stage(torch.float32, streams=RandomStreams(0, dp_rank=rank, dp_size=2))))
            for rank in range(2)
        ]
        assert torch.equal(torch.cat(parts, dim=1), whole)

    def test_the_stream_is_private_and_its_place_is_the_state(self) -> None:
        first, second = (toy_stage(torch.float32) for _ in range(2))
        torch.manual_seed(1)
        drawn = [torch.stack(self.drawn(*first))]
        state, draws = first[0].state(), first[0].roles.streams.draws
        drawn += [torch.stack(self.drawn(*first))]
        torch.manual_seed(2)
        torch.rand(5)
        second[0].plan_load(*state)()
        second[0].roles.streams.draws = draws
        assert torch.equal(torch.stack(self.drawn(*second)), drawn[1])
        assert not torch.equal(drawn[0], drawn[1])

    @pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 1), (1, 2)])
    def test_small_batches_have_every_bucket_in_its_share(self, count: int, ranks: int) -> None:
        """1000 steps, and any eight in a row, which gradient accumulation makes one of."""
        places = [
            toy_stage(torch.float32, streams=RandomStreams(0, dp_rank=rank, dp_size=ranks)) for rank in range(ranks)
        ]
        pairs = [torch.cat([torch.stack(self.drawn(*place, count)) for place in places], 1) for _ in range(1000)]
        diffusion, consistency = (
            torch.tensor([bucket(pair).sum().item() for pair in pairs])
            for bucket in (lambda pair: pair[0] == pair[1], lambda pair: pair[1] == 0)
        )
        samples = count * ranks
        for drawn, ratio in ((diffusion, 0.5), (consistency, 0.25)):
            assert drawn.sum().item() / (1000 * samples) == pytest.approx(ratio, abs=0.01)
            eight = drawn.unfold(0, 8, 1).sum(1)
            assert (eight - 8 * samples * ratio).abs().max() <= samples

    @pytest.mark.parametrize("family", ["Lumina2Transformer2DModel", SD3])
    def test_sigmas_are_noise_at_1_whichever_way_the_time_of_the_family_runs(self, family: str) -> None:
        """With shift 5 and one bucket, t and r together are uniform draws, shifted: 5/4 (1 - ln(5) / 4) = 0.7471."""
        options = {"schedule_shift": 5.0, "diffusion_ratio": 0.0, "consistency_ratio": 0.0}
        stage, denoiser = toy_stage(torch.float32, family, **options)
        sigma, r = self.drawn(stage, denoiser, 100_000)
        assert torch.cat([sigma, r]).mean().item() == pytest.approx(0.7471, abs=2e-3)  # 4 standard deviations
        both = denoiser.spec.model_time(torch.cat([sigma, r])) / abs(denoiser.spec.time_scale)
        assert both.mean().item() == pytest.approx(0.2529 if family.startswith("Lumina") else 0.7471, abs=2e-3)
        layout = TimeLayout(denoiser.spec, denoiser.bare, torch.zeros(3, 2, 3, 3))
        weight = stage._weight(torch.tensor([0.9, 0.5, 0.1]), layout).flatten()  # sigma sqrt(1 - sigma)
        assert torch.allclose(weight / weight[1], torch.tensor([0.8050, 1.0, 0.2683]), atol=1e-4)

    def test_shift_of_the_scheduler(self) -> None:
        def shift(**known: Any) -> float:
            config = {"target_mode": "meanflow", **known.pop("config", {})}
            return AnyFlowDistiller(protocol.student(SD3), config=config, **known)._stage.shift  # type: ignore[attr-defined]

        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        scheduler.set_timesteps(7)  # its own sigmas have nothing to do with it
        assert shift(noise_scheduler=scheduler) == 5.0
        assert shift(noise_scheduler=scheduler, config={"schedule_shift": 2.0}) == 2.0
        with pytest.raises(ValueError, match="needs schedule_shift"):
            shift()
        with pytest.raises(ValueError, match="depends on the resolution"):
            shift(noise_scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))

    @pytest.mark.parametrize(("epsilon", "share"), [(5.0, 0.76), (1.0, 0.61)])
    def test_times_that_come_in_bfloat16_are_moved_in_float32(self, epsilon: float, share: float) -> None:
        """In bfloat16, t + 5 and t - 5 are 8 to 12 apart, and t + 1 and t - 1 mostly nothing."""
        t = (1000 * torch.rand(8192, generator=torch.Generator().manual_seed(0))).bfloat16().clamp_min(4.0)
        narrow = (t + epsilon) - (t - epsilon)
        wrong = narrow != 2 * epsilon if epsilon == 5.0 else narrow == 0
        assert wrong.double().mean().item() == pytest.approx(share, abs=0.03)

        stage, denoiser = toy_stage(torch.bfloat16, central_difference_epsilon=epsilon / 1000, fuse_guidance_scale=1.0)
        sigmas = (t / 1000).bfloat16()
        x0, noise = torch.randn(2, len(t), 1, 1, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
        batch = {"latents": x0, "noise": noise, "sigmas": sigmas, "r_sigmas": sigmas / 2}
        layout = TimeLayout(denoiser.spec, denoiser.bare, x0)
        with torch.autocast("cpu", torch.bfloat16):
            sigma, r = stage.times(batch, layout)
            prepared = stage.prepare(batch, layout, sigma, r, None)
        (_, plus, r_plus, _), (_, minus, r_minus, _) = denoiser.calls[:2]
        gap = prepared[TERMS].derivative.gap.flatten()
        assert {x.dtype for x in (sigma, r, plus, minus, r_plus, r_minus, gap)} == {torch.float32}
        assert torch.equal(sigma, sigmas.float()) and torch.equal(gap, plus - minus)  # of what is fed
        assert torch.allclose(gap, torch.tensor(2 * epsilon / 1000), rtol=0, atol=1.2e-7)  # two roundings below 1

    def test_a_bfloat16_model_is_told_times_that_differ(self) -> None:
        model, told = protocol.student(SD3, dtype=torch.bfloat16), []
        model.register_forward_pre_hook(lambda _, a, k: told.append(k["timestep"]), with_kwargs=True)
        batch = batch_for(SD3, dtype=torch.bfloat16)
        batch |= {key: batch[key].bfloat16() for key in ("sigmas", "r_sigmas")}
        with torch.autocast("cpu", torch.bfloat16):
            AnyFlowDistiller(model, config=PLAIN).prepare_batch(batch)
        assert told[0].dtype == torch.float32
        assert torch.allclose(told[0] - told[1], torch.tensor(10.0), atol=2e-4)  # float32 below 1000

    def test_what_the_network_is_fed(self) -> None:
        """Float32 times in a bfloat16 network; two calls at the points of the path, one unconditional, all at r."""
        stage, denoiser = toy_stage(torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        x0, noise = torch.randn(2, 4, 2, 3, 3, generator=generator)
        batch = {"latents": x0, "noise": noise, "negative_conditioning": {}}
        layout = TimeLayout(denoiser.spec, denoiser.bare, x0)
        sigma, r = stage.times(batch, layout)
        prepared = stage.prepare(batch, layout, sigma, r, None)
        (_, plus, r_plus, _), (_, minus, r_minus, _), (x, at, r_at, negative) = denoiser.calls
        assert negative and all(s.dtype == torch.float32 for s in (plus, minus, at, r_plus, r_minus, r_at))
        assert all(torch.equal(s, r) for s in (r_plus, r_minus, r_at)) and torch.equal(at, sigma)
        gap = prepared[TERMS].derivative.gap.flatten()
        assert torch.equal(gap, plus - minus) and gap.dtype == torch.float32
        for x_s, s, _, _ in denoiser.calls:
            column = s.reshape(-1, 1, 1, 1)
            exact = (1 - column) * x0 + column * noise
            assert ((x_s.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()  # rounded once
        assert x.dtype == torch.bfloat16 and prepared["noisy_latents"].dtype == torch.float32


@pytest.mark.parametrize("name", protocol.NAMES)
def test_training_step(name: str) -> None:
    """Real networks of every layout: what the batch gets, logs, and a loss that falls."""
    model = protocol.student(name)
    distiller = AnyFlowDistiller(model, config=MEANFLOW)
    spec = find_spec(name.partition(":")[0])
    batch = batch_for(name, pair=False)
    keys, latents = set(batch), batch["latents"].clone()
    prepared = distiller.prepare_batch(batch)
    assert set(batch) == keys and torch.equal(batch["latents"], latents)
    sigma, r = prepared["sigmas"], prepared["anyflow_r_sigmas"]
    column = sigma.reshape(-1, *(1,) * (latents.ndim - 1))
    path = (1 - column) * latents + column * batch["noise"]
    assert torch.allclose(prepared["noisy_latents"], path, atol=1e-6)
    assert torch.equal(prepared["timesteps"], spec.model_time(sigma))
    assert torch.equal(prepared["flowmap_r_timesteps"], spec.model_time(r))
    assert prepared["target"] is prepared["flow_target"] and prepared["target"].dtype == torch.float32

    batch = batch_for(name)
    optimizer = torch.optim.Adam([p for _, p in distiller.trainable_parameters()], lr=3e-3)
    losses = []
    for _ in range(6):
        loss, logs = distiller.training_step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(logs["anyflow_diffusion_loss"].item())
    assert losses[-1] < losses[0]
    own = {"diffusion_loss", "diffusion_share", "difference", "difference_noise"}
    assert set(logs) == {f"anyflow_{key}" for key in ("loss", "timestep", "r_timestep", "interval", *own)}
    assert logs["anyflow_diffusion_share"] == 0.5 and not any(value.requires_grad for value in logs.values())


def test_target_of_a_real_network() -> None:
    """v - (t - r) dU/dsigma / g with the network called by hand, in the model's own sign; v where r = t."""
    for name in (SD3, "ZImageTransformer2DModel"):
        model, batch = protocol.student(name), batch_for(name)
        distiller = AnyFlowDistiller(model, config=MEANFLOW)
        prepared = distiller.prepare_batch(batch)
        sign = find_spec(name).prediction_sign
        v = batch["noise"] - batch["latents"]
        outputs = []
        for s in (0.905, 0.895):
            sigma = torch.tensor([s, 0.4])
            column = sigma.reshape(2, 1, 1, 1)
            x: Any = (1 - column) * batch["latents"] + column * batch["noise"]
            x = list(x.unsqueeze(2)) if name.startswith("Z") else x
            inputs = {**batch["conditioning"], find_spec(name).sample_arg: x}
            spec = find_spec(name)
            times = (spec.model_time(sigma), spec.model_time(batch["r_sigmas"]))
            with torch.no_grad():
                outputs.append(tiny_models.call(model, name, inputs, *times).reshape(v.shape))
        expected = v.clone()
        expected[0] -= 0.6 * sign * (outputs[0] - outputs[1])[0] / 0.01 / 3
        # Float32 outputs of order 1, rounded to 1e-7 and divided by the gap of 0.01.
        assert torch.allclose(sign * prepared["target"], expected, atol=1e-4)
        assert torch.equal(sign * prepared["target"][1], v[1])


class TestDropout:
    def model(self) -> Any:
        torch.manual_seed(0)
        model = tiny_models.build(SD3)
        model.requires_grad_(False)
        anyflow.patch(model)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.5, init_lora_weights=False))
        return model.train()

    def test_reaches_neither_the_difference_nor_the_fusion(self) -> None:
        model = self.model()
        distiller = AnyFlowDistiller(model, config=MEANFLOW)
        modes = [module.training for module in model.modules()]
        prepared = [distiller.prepare_batch(batch_for(SD3)) for _ in range(2)]
        assert torch.equal(prepared[0]["target"], prepared[1]["target"])
        assert torch.equal(*(p[TERMS].uncond_prediction for p in prepared))
        assert [module.training for module in model.modules()] == modes
        model.eval()
        assert torch.equal(distiller.prepare_batch(batch_for(SD3))["target"], prepared[0]["target"])

    def test_a_network_that_does_not_depend_on_time_has_no_derivative(self) -> None:
        """Neither on x: all that its answers could differ by is dropout."""
        model = self.model()
        model.dropout = nn.Dropout(0.1)
        model.proj_out.register_forward_hook(lambda _, __, output: model.dropout(torch.ones_like(output)))
        modes = [module.training for module in model.modules()]
        prepared = AnyFlowDistiller(model, config=PLAIN).prepare_batch(batch_for(SD3))
        derivative = prepared[TERMS].derivative
        assert torch.equal(derivative.u_plus, derivative.u_minus) and derivative.u_plus.eq(1).all()
        assert torch.equal(prepared["target"], prepared["noise"] - prepared["latents"])
        assert [module.training for module in model.modules()] == modes

    @pytest.mark.parametrize("failing", [1, 2, 3])
    def test_a_forward_that_fails_leaves_the_modes(self, failing: int) -> None:
        """The third one is unconditional."""
        model, calls = self.model(), []
        model.transformer_blocks[0].eval()
        modes = [module.training for module in model.modules()]

        def fail(*_: Any) -> None:
            calls.append(None)
            if len(calls) == failing:
                raise KeyError("boom")

        model.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="boom"):
            AnyFlowDistiller(model, config=MEANFLOW).prepare_batch(batch_for(SD3))
        assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()

    def test_the_prediction_keeps_it(self) -> None:
        distiller = AnyFlowDistiller(self.model(), config=PLAIN)
        losses = [distiller.training_step(batch_for(SD3))[0].item() for _ in range(2)]
        assert losses[0] != losses[1]

    def test_modes_come_back_after_an_exception(self) -> None:
        model = self.model()
        model.transformer_blocks[0].eval()
        network = nn.Dropout(0.5)
        modes = [module.training for module in model.modules()]

        def interrupted() -> None:
            with frozen(model, lycoris=network):
                assert not any(module.training for module in (*model.modules(), network))
                assert not torch.is_grad_enabled()
                raise KeyError

        with pytest.raises(KeyError):
            interrupted()
        assert [module.training for module in model.modules()] == modes and network.training


class TestCleanFrames:
    """Wan, image-to-video: the first of two frames is clean."""

    def prepared(self, **config: Any) -> tuple[AnyFlowDistiller, dict[str, Any], dict[str, Any]]:
        distiller = AnyFlowDistiller(protocol.student(WAN), config={**MEANFLOW, **config})
        batch = {**batch_for(WAN, pair=False), "sigmas": torch.tensor([[0.0, 0.5], [0.0, 0.7]])}
        return distiller, batch, distiller.prepare_batch(batch)

    def test_stay_clean_beside_one_draw_per_sample(self) -> None:
        _, batch, prepared = self.prepared()
        tokens = prepared["timesteps"].shape[1]
        for key in ("timesteps", "flowmap_r_timesteps"):
            assert not prepared[key][:, : tokens // 2].any()
            assert (prepared[key][:, tokens // 2 :] == prepared[key][:, -1:]).all()
        assert (prepared["timesteps"][:, -1] > 0).all()
        assert torch.equal(prepared["noisy_latents"][:, :, 0], batch["latents"][:, :, 0])
        plain = AnyFlowDistiller(protocol.student(WAN), config=MEANFLOW).prepare_batch(batch_for(WAN, pair=False))
        assert torch.equal(prepared["timesteps"][:, -1], plain["timesteps"])
        assert torch.isfinite(prepared["target"]).all()

    def test_do_not_count(self) -> None:
        distiller, _, prepared = self.prepared(meanflow_adaptive_weighting=False)
        prediction = torch.randn(prepared["target"].shape, generator=torch.Generator().manual_seed(0))
        other = prediction.clone()
        other[:, :, 0] += 100
        loss, _ = distiller.compute_distill_loss(prepared, prediction)
        assert torch.equal(distiller.compute_distill_loss(prepared, other)[0], loss)
        sigma = prepared["anyflow_sigmas"][:, -1]
        weight = anyflow.time.timestep_weight(sigma, "beta08", 3.0)
        uncond = prepared[TERMS].uncond_prediction
        error = ((prediction + 2 * uncond) / 3 - prepared["target"])[:, :, 1]
        assert loss.item() == pytest.approx((weight * error.square().flatten(1).mean(1)).mean().item(), rel=1e-5)

    @pytest.mark.parametrize("bad", [float("nan"), 1.5, 0.0])
    def test_what_the_batch_says_is_checked(self, bad: float) -> None:
        distiller = AnyFlowDistiller(protocol.student(WAN), config=MEANFLOW)
        with pytest.raises(ValueError, match=r"sigmas|time 0"):
            distiller.prepare_batch({**batch_for(WAN, pair=False), "sigmas": torch.tensor([[0.0, 0.5], [0.0, bad]])})


BASE = {**PLAIN, "diffusion_target": "base_prediction"}


class TestBasePrediction:
    @pytest.mark.parametrize("name", [SD3, "ZImageTransformer2DModel"])
    def test_for_the_samples_of_r_equal_t_only(self, name: str) -> None:
        model, batch = protocol.student(name), batch_for(name)
        prepared = AnyFlowDistiller(model, config=BASE).prepare_batch(batch)
        plain = AnyFlowDistiller(model, config=PLAIN).prepare_batch(batch)
        assert torch.equal(prepared["target"][0], plain["target"][0])
        stock = tiny_models.build(name)
        x: Any = prepared["noisy_latents"]
        inputs = {**batch["conditioning"], find_spec(name).sample_arg: list(x.unsqueeze(2)) if "Z" in name else x}
        with torch.no_grad():
            base = tiny_models.call(stock, name, inputs, prepared["timesteps"]).reshape(x.shape)
        assert torch.allclose(prepared["target"][1], base[1], atol=1e-6)

    def test_is_evaluated(self) -> None:
        """Dropout of the base itself, in a model that trains, is not in what it predicts."""
        targets = []
        for rate in (0.0, 0.5):
            model = protocol.student(SD3)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
            targets.append(AnyFlowDistiller(model.train(), config=BASE).prepare_batch(batch_for(SD3))["target"])
        assert torch.equal(*targets)
        with torch.no_grad():
            outputs = [model(torch.ones(1, 4, 8, 8), timestep=torch.ones(1), **self.one()).sample for _ in range(2)]
        assert not torch.equal(*outputs), "no dropout to leave out"

    def one(self) -> dict[str, Tensor]:
        return {key: value[:1] for key, value in batch_for(SD3)["conditioning"].items()}

    def test_a_student_that_is_still_the_base_keeps_the_balance(self) -> None:
        """Its diffusion loss is 0; what the base is off the path is the floor, so that other samples still count."""
        distiller = AnyFlowDistiller(protocol.student(SD3), config=BASE)
        prepared = distiller.prepare_batch(batch_for(SD3))
        prediction = prepared["target"].clone()
        prediction[0] += 1
        _, logs = distiller.compute_distill_loss(prepared, prediction)
        assert logs["anyflow_loss"] > 0.1 and logs["anyflow_diffusion_loss"] > 0.1

    def test_needs_a_base(self) -> None:
        with pytest.raises(ValueError, match="no adapter to switch off"):
            AnyFlowDistiller(tiny_models.build(SD3), config=BASE)
        AnyFlowDistiller(tiny_models.build(SD3), config=PLAIN)  # flow: data alone
        teacher, student = tiny_models.build(SD3), tiny_models.build(SD3, seed=1)
        AnyFlowDistiller(teacher, student, config=BASE).training_step(batch_for(SD3))


class TestPrecision:
    """bfloat16 weights; the difference of the same network in float32 is what it should be."""

    def differences(self, name: str, **config: Any) -> tuple[Tensor, Tensor]:
        def difference(model: Any, dtype: torch.dtype, **config: Any) -> Tensor:
            distiller = AnyFlowDistiller(model, config={**PLAIN, **config})
            derivative = distiller.prepare_batch(batch_for(name, dtype=dtype))[TERMS].derivative
            return (derivative.u_plus.float() - derivative.u_minus.float())[0]

        narrow = protocol.student(name, dtype=torch.bfloat16)
        wide = copy.deepcopy(narrow).float()
        batch = batch_for(name, dtype=torch.bfloat16)
        rounded = {k: v.float() if isinstance(v, Tensor) else v for k, v in batch["conditioning"].items()}
        distiller = AnyFlowDistiller(wide, config=PLAIN)
        derivative = distiller.prepare_batch({**batch, "conditioning": rounded})[TERMS].derivative
        return difference(narrow, torch.bfloat16, **config), (derivative.u_plus - derivative.u_minus)[0]

    @pytest.mark.parametrize("name", [SD3, WAN, "FluxTransformer2DModel", "UNet2DConditionModel"])
    def test_float32_forwards_of_a_bfloat16_model(self, name: str) -> None:
        found, expected = self.differences(name, difference_precision="float32")
        # Not exactly: a float32 matrix product of another memory layout may sum in another order.
        assert (found - expected).norm() <= 1e-3 * expected.norm()

    @pytest.mark.parametrize("name", [SD3, WAN])
    def test_the_model_as_it_is_swamps_it(self, name: str) -> None:
        """The reason for the option. Random networks bend so strongly over the gap that it shows less than in use."""
        found, expected = self.differences(name)
        assert (found - expected).norm() > 0.03 * expected.norm()

    def test_autocast_is_off_in_float32_forwards(self) -> None:
        def target(precision: str, autocast: bool) -> Tensor:
            distiller = AnyFlowDistiller(protocol.student(SD3), config={**PLAIN, "difference_precision": precision})
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return distiller.prepare_batch(batch_for(SD3))["target"]

        wide = target("float32", False)
        assert torch.equal(target("float32", True), wide) and torch.equal(target("model", False), wide)
        assert not torch.equal(target("model", True), wide)

    def test_half_of_a_pair_of_ones_own(self) -> None:
        distiller = AnyFlowDistiller(protocol.student(SD3), config=PLAIN)
        batch = {key: value for key, value in batch_for(SD3).items() if key != "sigmas"}
        with pytest.raises(ValueError, match="r_sigmas without sigmas"):
            distiller.prepare_batch({**batch, "r_sigmas": torch.tensor([0.3, 0.1])})

    def test_float32_forwards_of_a_compiled_model_run_eagerly(self) -> None:
        runs: list[None] = []

        def counting(graph: Any, _: Any) -> Any:
            return lambda *arguments: (runs.append(None), graph(*arguments))[1]

        def target(precision: str, compiled: bool) -> Tensor:
            model = protocol.student(SD3)
            distiller = AnyFlowDistiller(model, config={**PLAIN, "difference_precision": precision})
            called = torch.compile(model, backend=counting) if compiled else None
            return distiller.prepare_batch(batch_for(SD3), called)["target"]

        assert torch.equal(target("float32", True), target("float32", False)) and not runs
        target("model", True)
        assert len(runs) == 2

    def test_every_cast_to_half_precision_is_widened(self) -> None:
        x = torch.tensor([1.001])
        with float32_forward("cpu"):
            casts = [x.bfloat16(), x.half(), x.to(torch.bfloat16), x.type_as(x.bfloat16())]
        assert all(cast.dtype == torch.float32 and torch.equal(cast, x) for cast in casts)

    def test_noise_is_logged(self) -> None:
        """Independent errors of the three outputs, of a known size; nothing of the sample with r = t."""
        stage, denoiser = toy_stage(torch.float32, fuse_guidance_scale=1.0)
        generator = torch.Generator().manual_seed(0)
        x0, noise = torch.randn(2, 2, 4, 64, 64, generator=generator)
        batch = {
            "latents": x0,
            "noise": noise,
            "sigmas": torch.tensor([0.5, 0.4]),
            "r_sigmas": torch.tensor([0.2, 0.4]),
        }
        layout = TimeLayout(denoiser.spec, denoiser.bare, x0)
        prepared = stage.prepare(batch, layout, *stage.times(batch, layout), None)
        terms, size = prepared[TERMS], 0.1
        errors = size * torch.randn(3, *x0.shape, generator=generator)
        u = denoiser(prepared, prepared["noisy_latents"], batch["sigmas"], batch["r_sigmas"])
        _, clean = stage.loss(prepared, u)
        noisy = terms.derivative._replace(
            u_plus=terms.derivative.u_plus + errors[0], u_minus=terms.derivative.u_minus + errors[1]
        )
        _, logs = stage.loss({**prepared, TERMS: terms._replace(derivative=noisy)}, u + errors[2])
        # 16384 elements: the root mean square is known to half a percent.
        assert logs["anyflow_difference_noise"].item() == pytest.approx(2**0.5 * size, rel=0.03)
        assert clean["anyflow_difference_noise"] < 0.01 * clean["anyflow_difference"]
        _, none = stage.loss({**prepared, TERMS: terms._replace(interval=torch.zeros(2, 1, 1, 1))}, u)
        assert none["anyflow_difference_noise"] == 0 == none["anyflow_difference"]


class TestRefusals:
    def test_guidance_needs_what_it_guides_away_from(self) -> None:
        distiller = AnyFlowDistiller(protocol.student(SD3), config=MEANFLOW)
        batch = batch_for(SD3)
        del batch["negative_conditioning"]
        with pytest.raises(ValueError, match=r"fuse_guidance_scale=3\.0 needs negative_conditioning"):
            distiller.prepare_batch(batch)
        AnyFlowDistiller(protocol.student(SD3), config=PLAIN).prepare_batch(batch)

    @pytest.mark.parametrize(
        ("sigmas", "r", "message"),
        [
            ((0.5, 0.4), (0.6, 0.1), "at most t"),
            ((0.0, 0.4), (0.0, 0.1), "time 0"),
            ((0.5, 0.4), (-0.1, 0.1), r"\[0, t\]"),
        ],
    )
    def test_a_bad_pair(self, sigmas: Any, r: Any, message: str) -> None:
        distiller = AnyFlowDistiller(protocol.student(SD3), config=PLAIN)
        batch = {**batch_for(SD3), "sigmas": torch.tensor(sigmas), "r_sigmas": torch.tensor(r)}
        with pytest.raises(ValueError, match=message):
            distiller.prepare_batch(batch)

    def test_forward_mode_needs_the_bare_model(self) -> None:
        with pytest.raises(ValueError, match=r"derivative='jvp' needs the bare model.*central_difference"):
            AnyFlowDistiller(protocol.Trainer(protocol.student(SD3)), config={**PLAIN, "derivative": "jvp"})

    def test_a_layer_without_forward_mode(self) -> None:
        class Opaque(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad

        model = protocol.student(SD3)
        model.proj_out.register_forward_hook(lambda module, inputs, output: Opaque.apply(output))
        distiller = AnyFlowDistiller(model, config={**PLAIN, "derivative": "jvp"})
        with pytest.raises(NotImplementedError, match=r"SD3Transformer2DModel cannot.*central_difference"):
            distiller.prepare_batch(batch_for(SD3))


class TestTrainer:
    def test_equals_the_bare_model(self) -> None:
        trainer = protocol.Trainer(protocol.student(SD3))
        batch = batch_for(SD3)
        flat = {**batch, **batch["conditioning"], "sigmas": batch["sigmas"].reshape(2, 1, 1, 1), "noisy_latents": None}
        distiller = AnyFlowDistiller(trainer, config=MEANFLOW)
        prepared = distiller.prepare_batch(flat, trainer.model)
        bare = AnyFlowDistiller(protocol.student(SD3), config=MEANFLOW)
        expected = bare.prepare_batch(batch)
        assert torch.allclose(prepared["target"], expected["target"], atol=1e-5)
        assert prepared["sigmas"].shape == (2, 1, 1, 1) and all(s["sigmas"].shape == (2, 1, 1, 1) for s in trainer.seen)
        assert [("flowmap_r_timesteps" in seen) for seen in trainer.seen] == [True] * 3
        loss, _ = distiller.compute_distill_loss(prepared, trainer.model_predict(prepared), torch.zeros(()))
        expected_loss, _ = bare.training_step(batch)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
        loss.backward()
        assert all(p.grad is not None for _, p in anyflow.delta_parameters(trainer.model))


@pytest.mark.parametrize("r", [(0.9, 0.4), (0.3, 0.1), (0.0, 0.0), (0.3, 0.4)])
def test_the_same_work_whatever_is_in_the_buckets(r: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and collective calls: other ranks wait for each of them."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls: list[str] = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (calls.append("all_reduce"), all_reduce(*a, **k))[1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = protocol.student(SD3)
        for config in (MEANFLOW, BASE):
            distiller = AnyFlowDistiller(model, config=config)
            model.register_forward_pre_hook(lambda *a: calls.append("forward"))
            calls.clear()
            loss, _ = distiller.training_step({**batch_for(SD3), "r_sigmas": torch.tensor(r)})
            assert loss.isfinite()
            assert calls == ["all_reduce", *["forward"] * 4, "all_reduce"]
            model._forward_pre_hooks.clear()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_time_of_the_interval_is_finite(dtype: torch.dtype) -> None:
    """t next to 0 and at 1, r = t and r = 0, in both boundary modes; nothing divides by the interval."""
    pairs = [[1e-8, 1e-8], [1e-8, 0.0], [1.0, 1.0], [1.0, 0.0], [0.01, 0.005], [0.5, 0.4999]]
    times = torch.tensor(pairs, dtype=dtype)
    for boundary in ("extrapolate", "clamp"):
        distiller = AnyFlowDistiller(protocol.student(SD3), config={**PLAIN, "boundary_mode": boundary})
        for t, r in times:
            batch = {**batch_for(SD3), "sigmas": t.expand(2), "r_sigmas": r.expand(2)}
            prepared = distiller.prepare_batch(batch)
            loss, _ = distiller.training_step(batch)
            assert prepared["target"].isfinite().all() and loss.isfinite()
            if t == r:
                assert torch.equal(prepared["target"], batch["noise"] - batch["latents"])


def test_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def steps(distiller: AnyFlowDistiller, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            loss, _ = distiller.training_step(batch_for(SD3, seed=seed, pair=False))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def made() -> tuple[AnyFlowDistiller, Any]:
        distiller = AnyFlowDistiller(protocol.student(SD3), config=MEANFLOW)
        return distiller, torch.optim.AdamW([p for _, p in distiller.trainable_parameters()], lr=1e-3)

    whole, optimizer = made()
    steps(whole, optimizer, range(6))
    first, optimizer = made()
    steps(first, optimizer, range(3))
    first.on_save_checkpoint(3, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second, optimizer = made()
    with torch.no_grad():
        for _, parameter in second.trainable_parameters():
            parameter.zero_()
    assert second.on_load_checkpoint(tmp_path) == 3
    optimizer.load_state_dict(state)
    steps(second, optimizer, range(3, 6))
    for (name, a), (_, b) in zip(whole.trainable_parameters(), second.trainable_parameters(), strict=True):
        assert torch.equal(a, b), name
