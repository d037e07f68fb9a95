"""How well a central difference along the path is known: ``python -m benchmarks.derivative_precision``.

For networks whose weights are bfloat16 numbers, so that all precisions are of one network: the relative error of
dU/dsigma in bfloat16, in float32 under autocast, and in the float32 forwards of a bfloat16 network, against the same
difference in float64; and what ``anyflow_difference_noise`` / ``anyflow_difference`` of the log shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import anyflow
from anyflow.demo.data import conditioning, load_digits
from anyflow.demo.teacher import load_teacher
from anyflow.objectives import central_difference
from anyflow.precision import float32_forward

from .end_to_end import MODELS

EPSILONS = (0.0025, 0.005, 0.01, 0.02, 0.05)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    # of the weights, of the latents, and what is on during the forward
    "float64": (torch.float64, torch.float64, nullcontext),
    "bf16": (torch.bfloat16, torch.bfloat16, nullcontext),
    "autocast": (torch.float32, torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
    "float32": (torch.bfloat16, torch.float32, lambda: float32_forward("cpu")),
}
Inputs = tuple[Tensor, Tensor, dict[str, Any]]  # latents, noise, the other arguments of forward


def digits() -> tuple[Any, Inputs]:
    data, generator = load_digits(), torch.Generator().manual_seed(0)
    index = torch.randint(len(data.images), (256,), generator=generator)
    x0 = data.images[index]
    return load_teacher(), (x0, torch.randn(x0.shape, generator=generator), conditioning(data.labels[index]))


def of_the_benchmarks(name: str) -> tuple[Any, Inputs]:
    """A network with random weights, which follow the fastest features of the time more than trained ones do."""
    model = next(m for m in MODELS if m.name == name)
    batch = model.batch("cpu", torch.float32)
    return model.build("cpu", torch.float32), (batch["latents"], batch["noise"], batch["conditioning"])


def rounded(value: Any) -> Any:
    return value.bfloat16().to(value.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def differences(model: Any, inputs: Inputs, precision: str, epsilon: float) -> tuple[Tensor, float]:
    """dU/dsigma at one draw of (t, r) for each sample, and what the log shows of its noise."""
    weights, latents, context = PRECISIONS[precision]
    x0, noise, arguments = inputs
    model = copy.deepcopy(model).to(weights)
    arguments = {k: v.to(weights) if v.is_floating_point() else v for k, v in arguments.items()}
    generator = torch.Generator().manual_seed(1)
    sigma = 0.05 + 0.9 * torch.rand(len(x0), generator=generator)
    r = sigma * torch.rand(len(x0), generator=generator)

    def u(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        return model(x, timestep=1000 * s, r_timestep=1000 * r, **arguments, return_dict=False)[0]

    with context():
        lay = (-1, *(1,) * (x0.ndim - 1))
        found = central_difference(
            u, x0, noise, sigma, r, epsilon=epsilon, model_dtype=latents, to_latents=lambda s: s.reshape(lay)
        )
        plus, minus, middle = (v.double() for v in (found.u_plus, found.u_minus, u(found.x, sigma, r)))
    logged = (plus + minus - 2 * middle).norm() / 3**0.5 / (plus - minus).norm()
    return (plus - minus) / found.gap, logged.item()


def main() -> None:
    networks = {"digits, trained": digits(), **{n: of_the_benchmarks(n) for n in ("tiny SD3", "tiny Wan")}}
    print("| network | epsilon | rms of dU/dsigma | " + " | ".join(f"{p} | log" for p in list(PRECISIONS)[1:]) + " |")
    print("|" + "---|" * (3 + 2 * (len(PRECISIONS) - 1)))
    for name, (model, inputs) in networks.items():
        anyflow.patch(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = rounded(tensor.data)
        inputs = (*map(rounded, inputs[:2]), {k: rounded(v) for k, v in inputs[2].items()})
        for epsilon in EPSILONS:
            exact, _ = differences(model, inputs, "float64", epsilon)
            row = [name, f"{epsilon}", f"{exact.square().mean().sqrt():.2f}"]
            for precision in list(PRECISIONS)[1:]:
                found, logged = differences(model, inputs, precision, epsilon)
                row += [f"{100 * ((found - exact).norm() / exact.norm()).item():.2g} %", f"{logged:.2f}"]
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
