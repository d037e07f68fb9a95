"""Backward simulation and distribution matching, against float64 oracles written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.objectives import backward_simulation, distribution_matching, fake_score_loss, simulation_path
from anyflow.time import sample_logit_normal, sample_uniform, unshift_sigma

SHAPE = (3, 4, 5, 2)


def column(s: Tensor, like: Tensor) -> Tensor:
    return s.reshape(-1, *(1,) * (like.ndim - 1))


def draws(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


class TestPath:
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    @pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 50])
    def test_three_jumps_on_the_shifted_grid(self, steps: int, shift: float) -> None:
        for k in range(steps):
            u = [1 - i / steps for i in (k, k + 1)]
            here, after = (shift * v / (1 + (shift - 1) * v) for v in u)
            path = simulation_path(steps, k, shift)
            assert path[0] == 1.0 and path[-1] == 0.0 and list(path) == sorted(set(path), reverse=True)
            # The grid is float32.
            assert {1.0, 0.0} <= set(path) and len(path) == 4 - (k == 0) - (k == steps - 1)
            for s in (here, after):
                assert min(abs(s - p) for p in path) < 1e-7


class TestBackwardSimulation:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_linear_flow_map_and_its_derivative(self, sign: int) -> None:
        """u(x, t, r) = a(t, r) x: x_out = x_in product (1 - (t - r) a(t, r)), through every jump."""
        x, *_ = draws()
        x.requires_grad_()
        path = [torch.full((3,), s, dtype=torch.float64) for s in (1.0, 0.7, 0.3, 0.0)]

        def flow_map(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return sign * column(1 + t - 2 * r, x) * x

        out = backward_simulation(flow_map, x, path, sign=sign)
        factor = math.prod(1 - (t - r) * (1 + t - 2 * r) for t, r in ((1.0, 0.7), (0.7, 0.3), (0.3, 0.0)))
        assert torch.allclose(out, factor * x, rtol=0, atol=1e-12)
        (derivative,) = torch.autograd.grad(out.sum(), x)
        assert torch.allclose(derivative, torch.full_like(x, factor), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_exact_flow_map_of_a_straight_path_lands_on_x0(self, sign: int) -> None:
        x0, noise, *_ = draws(torch.float32)
        for steps, k in ((1, 0), (2, 0), (2, 1), (8, 3)):
            path = [torch.full((3,), s) for s in simulation_path(steps, k, 3.0)]
            out = backward_simulation(lambda *_: sign * (noise - x0), noise, path, sign=sign)
            assert torch.allclose(out, x0, atol=1e-6)

    def test_states_are_float32_and_inputs_the_models(self) -> None:
        noise = draws(torch.float32)[0]
        seen: list[tuple[torch.dtype, ...]] = []

        def flow_map(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            seen.append((x.dtype, t.dtype, r.dtype))
            return x

        path = [torch.full((3,), s) for s in (1.0, 0.5, 0.0)]
        out = backward_simulation(flow_map, noise, path, model_dtype=torch.bfloat16)
        assert out.dtype == torch.float32 and seen == 2 * [(torch.bfloat16, torch.float32, torch.float32)]

    def test_frames_have_their_own_interval(self) -> None:
        """[B, F] times on [B, C, F, H, W]: a clean frame stays where it is."""
        x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        levels = torch.ones(2, 4, dtype=torch.float64)
        levels[:, 0] = 0

        def lay(s: Tensor) -> Tensor:
            return s[:, None, :, None, None]

        path = [levels * s for s in (1.0, 0.6, 0.2, 0.0)]
        out = backward_simulation(lambda x, t, r: lay(t + r) * x, x, path, to_latents=lay)
        factor = math.prod(1 - (t - r) * (t + r) for t, r in ((1.0, 0.6), (0.6, 0.2), (0.2, 0.0)))
        assert torch.equal(out[:, :, 0], x[:, :, 0])
        assert torch.allclose(out[:, :, 1:], factor * x[:, :, 1:], rtol=0, atol=1e-12)


def matching_oracle(
    x: Tensor, noise: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, uncond: Tensor | None, g: float, sign: int
) -> tuple[Tensor, Tensor]:
    """The formulas in float64, on the values given: (loss [B], its derivative in x)."""
    x, noise, sigma, real, fake = (value.double() for value in (x, noise, sigma, real, fake))
    s = column(sigma, x)
    x_sigma = (1 - s) * x + s * noise
    if uncond is not None:
        real = uncond.double() + g * (real - uncond.double())
    x0_real, x0_fake = x_sigma - s * sign * real, x_sigma - s * sign * fake
    scale = (x - x0_real).abs().flatten(1).mean(1)
    gradient = (x0_fake - x0_real) / column(scale, x)
    loss = 0.5 * gradient.square().flatten(1).mean(1)
    return loss, gradient / x[0].numel()


def matching(dtype: torch.dtype, guided: bool, sign: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, noise, real, fake, uncond, _ = draws(dtype)
    sigma = torch.tensor([0.9, 0.4, 0.05], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x.requires_grad_()
    loss = distribution_matching(
        x,
        noise,
        sigma,
        lambda *_: (real, uncond if guided else None),
        lambda *_: fake,
        guidance_scale=3.0 if guided else 1.0,
        sign=sign,
    )
    (derivative,) = torch.autograd.grad(loss.sum(), x)
    expected = matching_oracle(x.detach(), noise, sigma, real, fake, uncond if guided else None, 3.0, sign)
    return loss, derivative, *expected


class TestDistributionMatching:
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("guided", [False, True])
    def test_float64(self, guided: bool, sign: int) -> None:
        loss, derivative, expected_loss, expected = matching(torch.float64, guided, sign)
        assert torch.allclose(loss, expected_loss, rtol=1e-12, atol=1e-12)
        assert torch.allclose(derivative, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("guided", [False, True])
    def test_no_worse_than_twice_eager(self, guided: bool, dtype: torch.dtype) -> None:
        loss, derivative, expected_loss, expected = matching(dtype, guided, 1)

        x, noise, real, fake, uncond, _ = draws(dtype)
        s = column(torch.tensor([0.9, 0.4, 0.05]), x).to(dtype)
        x.requires_grad_()
        x_sigma = ((1 - s) * x + s * noise).detach()
        v_real = uncond + 3.0 * (real - uncond) if guided else real
        x0_real, x0_fake = x_sigma - s * v_real, x_sigma - s * fake
        scale = column((x.detach() - x0_real).abs().flatten(1).mean(1), x)
        target = x.detach() - (x0_fake - x0_real) / scale
        eager = 0.5 * (x - target).square().flatten(1).mean(1)
        (eager_derivative,) = torch.autograd.grad(eager.sum(), x)

        def error(value: Tensor, exact: Tensor) -> float:
            return (value.double() - exact).norm().item()

        assert error(loss, expected_loss) <= 2 * error(eager, expected_loss)
        assert error(derivative, expected) <= 2 * error(eager_derivative, expected)

    @pytest.mark.parametrize("fault", ["x == x0_real", "nan real", "inf real", "nan fake", "nan uncond", "inf fake"])
    def test_a_bad_sample_has_zero_gradient_and_the_others_do_not_notice(self, fault: str) -> None:
        x, noise, real, fake, uncond, _ = draws(torch.float32)
        sigma = torch.tensor([0.9, 0.5, 0.3])
        kind, _, where = fault.partition(" ")
        scores = {"real": real, "fake": fake, "uncond": uncond}

        def run(rows: slice | list[int]) -> tuple[Tensor, Tensor]:
            leaf = x[rows].clone().requires_grad_()
            loss = distribution_matching(
                leaf,
                noise[rows],
                sigma[rows],
                lambda *_: (scores["real"][rows], scores["uncond"][rows]),
                lambda *_: scores["fake"][rows],
                guidance_scale=2.0,
            )
            return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

        good = run([0, 2])
        if where in scores:
            scores[where] = scores[where].clone()
            scores[where][1, 0, 0, 0] = float(kind)
        else:  # v_real = noise - x, in powers of two, puts x0_real on x to the bit
            x[1], noise[1], uncond[1] = 1.0, 2.0, 1.0
            real[1] = 1.0
        loss, derivative = run(slice(None))
        assert loss[1] == 0 and not derivative[1].any()
        assert torch.equal(loss[[0, 2]], good[0]) and torch.equal(derivative[[0, 2]], good[1])

    def test_sigma_of_zero_gives_nothing(self) -> None:
        x, noise, real, fake, *_ = draws(torch.float32)
        leaf = x.clone().requires_grad_()
        loss = distribution_matching(
            leaf, noise, torch.tensor([0.0, 1.0, 0.5]), lambda *_: (real, None), lambda *_: fake
        )
        (derivative,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss[0] == 0 and not derivative[0].any() and derivative[1:].flatten(1).any(1).all()

    def test_equal_scores_leave_the_sample_alone(self) -> None:
        x, noise, real, *_ = draws(torch.float32)
        loss = distribution_matching(x, noise, torch.full((3,), 0.5), lambda *_: (real, None), lambda *_: real)
        assert not loss.any()

    def test_scores_see_the_noised_sample_without_its_graph(self) -> None:
        x, noise, real, fake, *_ = draws(torch.float32)
        sigma, seen = torch.tensor([0.9, 0.5, 0.3]), []

        def score(velocity: Any) -> Callable[[Tensor, Tensor], Any]:
            def call(x: Tensor, s: Tensor) -> Any:
                seen.append((x, s))
                return velocity

            return call

        distribution_matching(x.requires_grad_(), noise, sigma, score((real, None)), score(fake))
        s = column(sigma, x)
        for given, at in seen:
            assert not given.requires_grad and torch.equal(at, sigma)
            assert torch.allclose(given, (1 - s) * x + s * noise, atol=1e-6)
        assert len(seen) == 2

    def test_float32_under_autocast(self) -> None:
        """bf16 or fp16 scores far from each other: sums in float32, finite where fp16 squares would not be."""
        x, noise, *_ = draws(torch.float32)
        real, fake = torch.full_like(x, 1e4).half(), torch.full_like(x, -1e4).half()
        with torch.autocast("cpu", torch.bfloat16):
            loss = distribution_matching(x, noise, torch.full((3,), 0.5), lambda *_: (real, None), lambda *_: fake)
        expected, _ = matching_oracle(x, noise, torch.full((3,), 0.5), real, fake, None, 1.0, 1)
        assert loss.dtype == torch.float32 and torch.allclose(loss.double(), expected, rtol=1e-5)


class TestFakeScore:
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_flow_matching_on_the_samples(self, sign: int, dtype: torch.dtype) -> None:
        x, noise, weight, *_ = draws(dtype)
        sigma = torch.tensor([0.9, 0.4, 0.05], dtype=dtype)
        weight = weight[0].requires_grad_()
        loss = fake_score_loss(x, noise, sigma, lambda x, s: weight * x + column(s, x), sign=sign)
        (derivative,) = torch.autograd.grad(loss.sum(), weight)

        exact = weight.detach().double().requires_grad_()
        s = column(sigma.double(), x)
        x_sigma = (1 - s) * x.double() + s * noise.double()
        error = sign * (exact * x_sigma + s) - (noise.double() - x.double())
        expected = error.square().flatten(1).mean(1)
        (expected_derivative,) = torch.autograd.grad(expected.sum(), exact)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # of order 10 in float32
        assert torch.allclose(loss.double(), expected, rtol=0, atol=tolerance)
        assert torch.allclose(derivative.double(), expected_derivative, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_worse_than_twice_eager(self, dtype: torch.dtype) -> None:
        x, noise, weight, *_ = draws(dtype)
        sigma = torch.tensor([0.9, 0.4, 0.05])

        def loss_and_derivative(value: Callable[[Tensor, Tensor], Tensor], kind: torch.dtype) -> tuple[Tensor, Tensor]:
            leaf = weight[0].detach().to(kind).requires_grad_()
            loss = value(leaf, column(sigma, x).to(kind))
            return loss.detach().double(), torch.autograd.grad(loss.sum(), leaf)[0].double()

        def ours(leaf: Tensor, s: Tensor) -> Tensor:
            return fake_score_loss(x, noise, sigma, lambda x, _: leaf * x)

        def formula(leaf: Tensor, s: Tensor) -> Tensor:
            at, n = x.to(s.dtype), noise.to(s.dtype)
            return (leaf * ((1 - s) * at + s * n) - (n - at)).square().flatten(1).mean(1)

        exact = loss_and_derivative(formula, torch.float64)
        for got, eager, value in zip(
            loss_and_derivative(ours, dtype), loss_and_derivative(formula, dtype), exact, strict=True
        ):
            assert (got - value).norm() <= 2 * (eager - value).norm()

    def test_clean_frames_and_bad_samples_do_not_count(self) -> None:
        x, noise = torch.randn(2, 2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
        x[1, 0, 0, 0, 0] = float("nan")
        sigma = torch.tensor([[0.0, 0.5, 0.7], [0.0, 0.5, 0.7]])
        weight = torch.ones((), requires_grad=True)

        def lay(s: Tensor) -> Tensor:
            return s[:, None, :, None, None]

        loss = fake_score_loss(x, noise, sigma, lambda x, _: weight * x, to_latents=lay)
        loss.sum().backward()
        s = lay(sigma[:1])
        x_sigma = (1 - s) * x[:1] + s * noise[:1]
        error = (x_sigma - (noise[:1] - x[:1]))[:, :, 1:]
        assert torch.allclose(loss[0], error.square().sum() / x[0].numel(), rtol=1e-6)
        assert loss[1] == 0
        assert weight.grad is not None and torch.isfinite(weight.grad)

    def test_no_gradient_reaches_the_student(self) -> None:
        x, noise, *_ = draws(torch.float32)
        x.requires_grad_()
        weight = torch.ones((), requires_grad=True)
        fake_score_loss(x, noise, torch.full((3,), 0.5), lambda x, _: weight * x).sum().backward()
        assert x.grad is None and weight.grad is not None


class TestSigmas:
    def test_uniform_before_the_shift(self) -> None:
        sigma = sample_uniform(100_000, 5.0, torch.Generator().manual_seed(0))
        assert sigma.dtype == torch.float32 and sigma.min() >= 0 and sigma.max() < 1
        # The mean of s u / (1 + (s - 1) u) over u uniform is s / (s - 1) (1 - ln s / (s - 1)); noise is 1, not 0.
        assert sigma.mean().item() == pytest.approx(5 / 4 * (1 - math.log(5) / 4), abs=3e-3)
        u = unshift_sigma(sigma.double(), 5.0).sort().values
        assert (u - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max() < 6e-3  # Kolmogorov, p = 1e-3

    def test_logit_normal_before_the_shift(self) -> None:
        sigma = sample_logit_normal(100_000, 5.0, 0.3, 0.8, torch.Generator().manual_seed(0))
        logit = unshift_sigma(sigma.double(), 5.0).logit()
        assert logit.mean().item() == pytest.approx(0.3, abs=0.01)
        assert logit.std().item() == pytest.approx(0.8, abs=0.01)
