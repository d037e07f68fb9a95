"""Sigma, shift, grids and the draw of r."""

from __future__ import annotations

import pytest
import torch

from anyflow.families import families, find_spec
from anyflow.time import sample_r, shift_sigma, sigma_grid, unshift_sigma


def test_shift_is_applied_once_and_inverts() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0, 7.0):
        sigma = shift_sigma(u, shift)
        assert torch.allclose(sigma, shift * u / (1 + (shift - 1) * u), rtol=0, atol=0)
        assert torch.allclose(unshift_sigma(sigma, shift), u, atol=1e-14)
        assert sigma[0] == 0 and sigma[-1] == 1
    with pytest.raises(ValueError, match="-1"):
        shift_sigma(0.5, -1)


def test_shift_5_pushes_to_the_noise() -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    # int_0^1 5u/(1+4u) du = (5/4)(1 - ln(5)/4)
    assert shift_sigma(u, 5.0).mean().item() == pytest.approx(
        1.25 * (1 - torch.log(torch.tensor(5.0)).item() / 4), abs=1e-6
    )
    assert shift_sigma(u, 5.0).mean().item() == pytest.approx(0.7471, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_grid(steps: int) -> None:
    grid = sigma_grid(steps, shift=3.0)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0 and grid.dtype == torch.float32
    assert (grid[1:] < grid[:-1]).all()
    with pytest.raises(ValueError, match="0"):
        sigma_grid(0)


@pytest.mark.parametrize("sampler", ["uniform", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_r_is_below_t_everywhere(sampler: str, dtype: torch.dtype) -> None:
    sigma = torch.cat([torch.tensor([1e-8, 0.01, 0.02, 1.0]), torch.rand(10_000)]).to(dtype)
    r = sample_r(sigma, sampler, 0.02, torch.Generator().manual_seed(0))
    assert r.dtype == dtype and (r >= 0).all() and (r <= 0.98 * sigma * (1 + 1e-6)).all()
    if sampler == "zero":
        assert not r.any()
    else:
        assert (r / sigma).mean().item() == pytest.approx(0.49, abs=0.01)  # 0.98 / 2; the mean of 1e4 has sd 0.003


def test_frames_share_their_sample_and_clean_ones_stay_clean() -> None:
    sigma = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.2, 0.4]])
    r = sample_r(sigma, "uniform", 0.02, torch.Generator().manual_seed(0))
    assert not r[:, 0].any()
    assert torch.allclose(r[:, 2], 2 * r[:, 1])
    assert torch.rand(1, generator=torch.Generator().manual_seed(0)) >= 0


def test_r_is_drawn_from_its_own_stream() -> None:
    sigma = torch.rand(16)
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        first = sample_r(sigma, "uniform", 0.0, generator)
        torch.rand(5)
        draws.append((first, sample_r(sigma, "uniform", 0.0, generator)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("name", families())
def test_model_time_and_back(name: str) -> None:
    spec = find_spec(name)
    sigma = torch.rand(64, dtype=torch.float64)
    assert torch.allclose(spec.sigma(spec.model_time(sigma)), sigma, atol=1e-12)


@pytest.mark.parametrize("name", families())
def test_the_scale_is_declared_and_never_read_off_the_values(name: str) -> None:
    """Times of 0.7 of 1000, and of a little more than 1 of 1, in a batch of 1 or of 64."""
    spec = find_spec(name)
    few = torch.tensor([0.0007, 0.0004, 1.0000001])
    exact = spec.time_scale * few.double() + spec.time_offset
    assert torch.allclose(spec.model_time(few).double(), exact, rtol=0, atol=2e-7 * max(1.0, abs(spec.time_scale)))
    for rows in (few[:1], few[2:], few.repeat(22)[:64]):
        assert torch.equal(spec.model_time(rows), torch.stack([spec.model_time(row) for row in rows]))


def test_reversed_time() -> None:
    spec = find_spec("ZImageTransformer2DModel")
    assert spec.model_time(0.8) == pytest.approx(0.2) and spec.model_time(0.3) == pytest.approx(0.7)
    assert spec.prediction_sign == -1
