"""The straight path's velocity."""

from torch import Tensor

from ..time import at_least_float32


def linear_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = noise - x0: the velocity of x_sigma = (1 - sigma) x0 + sigma noise (Lipman et al. 2023).

    Shapes and dtypes: [B, ...] alike; float32, float64 stays float64. Does not depend on r.
    """
    return at_least_float32(noise) - at_least_float32(x0)
