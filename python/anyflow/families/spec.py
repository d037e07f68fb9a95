"""What a spec says about a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class EmbedderSite:
    """One time embedder that gets a second, delta embedder beside it.

    ``embedder``: path of the module. Its clone becomes the sibling ``delta_embedder``.
    ``sinusoid``: path of the module that turns times [M] into features [M, C]; None when the embedder takes the times
        themselves.
    ``pre_scale``: the factor that the model's forward applies to its time argument before the sinusoid, or the key of
        the model's config that holds it.
    ``calls``: what the calls of one forward embed, in order: "flow" = the time argument, "constant" = a fixed time of
        clean or reference rows, for which r = t.
    """

    embedder: str
    sinusoid: str | None
    pre_scale: float | str = 1.0
    calls: tuple[Literal["flow", "constant"], ...] = ("flow",)

    @property
    def delta(self) -> str:
        parent, _, _ = self.embedder.rpartition(".")
        return f"{parent}.delta_embedder" if parent else "delta_embedder"


@dataclass(frozen=True)
class FamilySpec:
    """Where time enters one diffusers class, and what its numbers mean.

    ``class_name``: the name of the diffusers class; also the name of the family.
    ``time_scale``, ``time_offset``: the model's time argument is time_scale * sigma + time_offset.
    ``prediction_sign``: +1 when the output is noise - x0, -1 when it is x0 - noise.
    ``sites``: the embedders of the time.
    ``timestep_arg``, ``sample_arg``: names of the time and of the latents in forward.
    ``sample_layout``: "tensor" [B, ...], or "list" when forward takes and returns a list of [C, 1, H, W].
    ``token_times``: forward also takes times [B, S], one for each patch, frame by frame.
    ``left``: (path, why) of neighbouring embedders that stay as they are.
    """

    class_name: str
    time_scale: float
    sites: tuple[EmbedderSite, ...]
    time_offset: float = 0.0
    prediction_sign: Literal[1, -1] = 1
    timestep_arg: str = "timestep"
    sample_arg: str = "hidden_states"
    sample_layout: Literal["tensor", "list"] = "tensor"
    token_times: bool = False
    left: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError(f"spec {self.class_name}: needs at least one EmbedderSite")
        if self.time_scale == 0:
            raise ValueError(f"spec {self.class_name}: time_scale must not be 0")
        if self.prediction_sign not in (1, -1):
            raise ValueError(f"spec {self.class_name}: prediction_sign must be 1 or -1, got {self.prediction_sign!r}")
        deltas = [site.delta for site in self.sites]
        if len(set(deltas)) != len(deltas):
            raise ValueError(f"spec {self.class_name}: two sites share the delta path {deltas}")

    def model_time(self, sigma: Any) -> Any:
        """The model's time argument at ``sigma``."""
        return self.time_scale * sigma + self.time_offset

    def sigma(self, model_time: Any) -> Any:
        """The inverse of ``model_time``."""
        return (model_time - self.time_offset) / self.time_scale
