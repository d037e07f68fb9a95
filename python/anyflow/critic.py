"""The fake score: its parameters, its optimizer, and how it is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import add_critic, base_mode, critic_parameters, frozen
from .config import AnyFlowConfig
from .distributed import average_gradients, is_sharded, sharded_like, whole
from .patching.names import CRITIC, of_critic
from .patching.unwrap import unwrap

_WEIGHT, _OPTIMIZER = "critic.", "critic_optimizer."


class Critic:
    """A second adapter on the frozen base, or a network of its own, with an AdamW that knows its parameters alone.

    ``base``: the network of the real score, bare. The critic is an adapter on it, added where it is missing, unless
        ``separate`` is given, a whole network.
    ``student``: the network of the student, bare; often ``base``. ``lycoris``: its LyCORIS network, if there is one.

    Raises ValueError for a teacher, other than the student's network, that is not frozen.

    The optimizer is made at the first step or load, when FSDP has put its own parameters in the place of the model's.
    """

    def __init__(
        self,
        base: nn.Module,
        student: nn.Module,
        config: AnyFlowConfig,
        *,
        separate: nn.Module | None = None,
        lycoris: nn.Module | None = None,
    ) -> None:
        self.config, self.separate, self.lycoris = config, separate, lycoris
        self._networks = tuple({id(network): network for network in (base, student)}.values())
        self._base = base
        if separate is None:
            add_critic(base, seed=config.seed)
            if base is not student:
                trains = [name for name, p in base.named_parameters() if p.requires_grad and not of_critic(name)]
                if trains:
                    raise ValueError(f"{trains[0]} of the teacher requires a gradient: teacher.requires_grad_(False)")
        narrow = sorted(name for name, p in self.named_parameters() if p.element_size() < 4)
        if narrow:
            warnings.warn(
                f"{narrow[0]} and {len(narrow) - 1} more weights of the critic have two bytes: steps of "
                f"{config.critic_learning_rate} round to nothing there. Keep them in float32, with autocast.",
                stacklevel=4,
            )
        self._optimizer: torch.optim.AdamW | None = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the critic, and of nothing else."""
        if self.separate is None:
            return critic_parameters(self._base)
        return [(name, parameter) for name, parameter in self.separate.named_parameters() if parameter.requires_grad]

    @property
    def optimizer(self) -> torch.optim.AdamW:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(
                [parameter for _, parameter in self.named_parameters()],
                lr=self.config.critic_learning_rate,
                betas=(float(self.config.critic_betas[0]), float(self.config.critic_betas[1])),
                weight_decay=self.config.critic_weight_decay,
            )
        return self._optimizer

    @contextmanager
    def scored(self) -> Iterator[None]:
        """The critic answers, in evaluation mode, without gradient; exactly the entry state comes back."""
        if self.separate is not None:
            with frozen(self.separate):
                yield
            return
        with base_mode(*self._networks, adapter=CRITIC, lycoris=self.lycoris), frozen(*self._networks):
            yield

    @contextmanager
    def trained(self, called: nn.Module | None) -> Iterator[None]:
        """The critic answers and may be stepped; exactly the entry state comes back.

        ``called``: the module through which it is called. Where that is DDP, this backward is none of its reducer's.
        """
        if self.separate is not None:
            yield
            return
        wrapper: Any = called if called is None else unwrap(called, until="DistributedDataParallel")
        for _, parameter in self.named_parameters():
            if not parameter.requires_grad:  # peft freezes what is not active whenever it activates something
                parameter.requires_grad_(True)
        with (
            base_mode(*self._networks, adapter=CRITIC, lycoris=self.lycoris),
            wrapper.no_sync() if hasattr(wrapper, "no_sync") else nullcontext(),
        ):
            yield

    def step(self, loss: Tensor) -> Tensor:
        """One step down ``loss``, inside of ``trained``: gradients averaged over the ranks, clipped, AdamW. Returns
        their norm. Where it is not finite, on all ranks alike, the gradient counts as zero."""
        parameters = [parameter for _, parameter in self.named_parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        if all(parameter.grad is None for parameter in parameters):
            warnings.warn(
                "no gradient reached the critic: re-entrant gradient checkpointing (use_reentrant=True) gives none "
                "where all inputs of a block are frozen",
                stacklevel=2,
            )
        average_gradients(parameters)
        norm = _clip(parameters, self.config.critic_max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name. With FSDP a collective: every rank has to call it."""
        tensors = {f"{_WEIGHT}{name}": whole(parameter) for name, parameter in self.named_parameters()}
        for name, parameter in self.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}.{name}"] = whole(value)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse. Raises ValueError, and changes nothing, for missing, unexpected or misshapen tensors."""
        self.plan_load(tensors)()

    def plan_load(self, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """``load_state`` in two: checked here, done by what it returns."""
        own = dict(self.named_parameters())
        weights = {key.removeprefix(_WEIGHT): value for key, value in tensors.items() if key.startswith(_WEIGHT)}
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(_OPTIMIZER):
                kind, _, name = key.removeprefix(_OPTIMIZER).partition(".")
                moments.setdefault(name, {})[kind] = value
        unfit = sorted(own.keys() ^ weights.keys()) + sorted(moments.keys() - own.keys())
        unfit += sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
        if unfit:
            raise ValueError(f"the checkpoint holds another critic; missing, unexpected or misshapen: {unfit}")

        @torch.no_grad()
        def load() -> None:
            state = self.optimizer.state
            for name, parameter in own.items():
                parameter.copy_(sharded_like(weights[name], parameter))
                state.pop(parameter, None)
                if name in moments:
                    state[parameter] = {
                        kind: value.clone() if value.ndim == 0 else sharded_like(value, parameter)
                        for kind, value in moments[name].items()
                    }

        return load


@torch.no_grad()
def _clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients to a norm of at most ``limit``, and to zero where it is not finite; returns the norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [[g for g in gradients if is_sharded(g) == sharded] for sharded in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in parts if part]
    norm = torch.linalg.vector_norm(torch.stack([n.to(torch.float32) for n in norms]))
    usable = norm.isfinite()
    scale = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined]
        local.copy_(torch.where(usable, local * scale, 0))
    return norm
