"""What a spec says about a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GIVEN = "given"  # in ``Rows.when``: the argument is there and not None


@dataclass(frozen=True)
class Rows:
    """What one call of an embedder embeds.

    ``of``: "time" = the model's time argument; the name of another time argument of forward; or "constant" = fixed
        times of clean or reference rows, for which r = t.
    ``constant_tail``: the rows after those of the time are constant rows too.
    ``when``, ``unless``: the call takes place when all (not when any) of these arguments of forward, or else keys of
        the config, have these values; ``GIVEN`` stands for any value but None.
    """

    of: str = "time"
    constant_tail: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)


TIME, CONSTANT = Rows(), Rows("constant")


@dataclass(frozen=True)
class Sinusoid:
    """Features that a model has ``get_timestep_embedding`` of diffusers compute, cosines first.

    A string is the key of the model's config that holds the number.
    """

    num_channels: int | str
    scale: float | str = 1.0
    max_period: float | str = 10000.0


@dataclass(frozen=True)
class EmbedderSite:
    """One time embedder, which gets a second, delta embedder beside it.

    ``embedder``: path of the module; ``*`` stands for one name, and the site for every module that fits.
    ``sinusoid``: path of the module, or of the method of the model, that turns times [M] into features [M, ...]; or a
        ``Sinusoid``; None when the embedder takes the times themselves.
    ``pre_scale``: the factor that the model's forward applies to its time argument before the sinusoid, or the key of
        the model's config that holds it.
    ``calls``: what the calls of one forward embed, in order; those whose condition fails are left out. Calls that do
        not come are no error, as long as one with times does.
    ``delta_name``: name of the clone, a sibling of the embedder.
    ``first_linear``: of an embedder that takes the times: the layer inside it that its float32 features enter, where
        the stock code rounds the features to the dtype of its argument.
    ``whole_times``: the stock forward truncates its times to integers, and so it is trained.
    """

    embedder: str
    sinusoid: str | Sinusoid | None
    pre_scale: float | str = 1.0
    calls: tuple[Rows, ...] = (TIME,)
    delta_name: str = "delta_embedder"
    first_linear: str | None = None
    whole_times: bool = False

    @property
    def delta(self) -> str:
        parent, _, _ = self.embedder.rpartition(".")
        return f"{parent}.{self.delta_name}" if parent else self.delta_name


@dataclass(frozen=True)
class NativeTime:
    """A second time that the class has itself: the model is driven through it, and nothing is cloned.

    ``arg``: its name in forward. ``delta``: path of the embedder of the second time. ``required``: forward does not do
    without; r = t is filled in where the caller gives none.
    ``embeds``: (site, what it embeds: "t", "r" or "t-r") of the embedders whose times the stock forward rounds.
    """

    arg: str
    delta: str
    required: bool = False
    embeds: tuple[tuple[EmbedderSite, Literal["t", "r", "t-r"]], ...] = ()


@dataclass(frozen=True)
class FamilySpec:
    """Where time enters one diffusers class, and what its numbers mean.

    ``class_name``: the name of the diffusers class; also the name of the family.
    ``time_scale``, ``time_offset``: the model's time argument is time_scale * sigma + time_offset.
    ``prediction_sign``: +1 when the output is noise - x0, -1 when it is x0 - noise.
    ``sites``: the embedders of the time.
    ``timestep_arg``, ``sample_arg``: names of the time and of the latents in forward.
    ``time_dtype``: "any", or "model" when the stock forward needs times in the dtype of the model.
    ``sample_layout``: "tensor" [B, ...]; or what the list holds that forward takes and returns: "list" [C, 1, H, W],
        "videos" [C, F, H, W], "batches" [1, ...].
    ``channels_last``: latents of more than three dimensions have their channels last.
    ``predicts_text``: the output has the tokens of the condition ahead of those of the latents.
    ``times``: the shapes of time that forward takes. "sample": [B]; "patches": also [B, S] for latents
        [B, C, F, H, W], one for each patch, frame by frame; "tokens": also [B, S] for latents [B, S, C]; "frames" also
        one for each latent frame of [B, C, F, H, W], laid out as ``frames``; "packed": [M], one for each token or
        level of a packed sequence, to which only the caller has the key.
    ``frames``: the layout of framewise times: "B F", "B 1 F" or "B 1 F 1 1".
    ``frame_dim``: the dimension of the latents that holds the frames.
    ``per_sample``: forward takes [B] too.
    ``native``: the second time that the class has itself.
    ``variants``: (config condition, changes): other fields of the spec, for a class whose code depends on its config.
    ``refused``: (config condition, why): checkpoints of the class that are no flow-matching models in this time.
    ``refused_pipelines``: (pipeline class, why), where only the pipeline tells.
    ``guidance_off``: the arguments of the family's pipelines that turn classifier-free guidance off.
    ``replace_grid``: the stock pipeline hands its scheduler a grid that wastes steps when they are few, because it
        ends next to 0 or is warped: samplers take a uniform one.
    ``time_before_shift``: the stock pipeline shifts its sigmas by the resolution and tells its model the times from
        before. Here the time is that of sigma, and a distiller warns.
    ``learned_sigma``: with out_channels = 2 in_channels, the second half of the output is a variance.
    ``checkpointed``: the embedders lie inside of the blocks that gradient checkpointing runs again, without times.
    ``left``: (path, why) of neighbouring embedders that stay as they are.
    """

    class_name: str
    time_scale: float
    sites: tuple[EmbedderSite, ...]
    time_offset: float = 0.0
    prediction_sign: Literal[1, -1] = 1
    timestep_arg: str = "timestep"
    sample_arg: str = "hidden_states"
    time_dtype: Literal["any", "model"] = "any"
    sample_layout: Literal["tensor", "list", "videos", "batches"] = "tensor"
    channels_last: bool = False
    predicts_text: bool = False
    times: Literal["sample", "patches", "tokens", "frames", "packed"] = "sample"
    frames: str = "B F"
    frame_dim: int = 2
    per_sample: bool = True
    native: NativeTime | None = None
    variants: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()
    refused: tuple[tuple[Mapping[str, Any], str], ...] = ()
    refused_pipelines: tuple[tuple[str, str], ...] = ()
    guidance_off: Mapping[str, float | None] = field(
        default_factory=lambda: {
            "guidance_scale": 1.0,
            "true_cfg_scale": 1.0,
            "image_guidance_scale": 1.0,
            "img_guidance_scale": 1.0,
            "pag_scale": 0.0,
        }
    )
    replace_grid: bool = False
    time_before_shift: bool = False
    learned_sigma: bool = False
    checkpointed: bool = False
    left: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.sites and self.native is None:
            raise ValueError(f"spec {self.class_name}: needs at least one EmbedderSite")
        if self.time_scale == 0:
            raise ValueError(f"spec {self.class_name}: time_scale must not be 0")
        if self.prediction_sign not in (1, -1):
            raise ValueError(f"spec {self.class_name}: prediction_sign must be 1 or -1, got {self.prediction_sign!r}")
        deltas = [site.delta for site in self.sites]
        if len(set(deltas)) != len(deltas):
            raise ValueError(f"spec {self.class_name}: two sites share the delta path {deltas}")

    @property
    def time_args(self) -> tuple[str, ...]:
        """Every time argument of forward, the main one first."""
        sites = [*self.sites, *(site for site, _ in (self.native.embeds if self.native else ()))]
        others = [rows.of for site in sites for rows in site.calls if rows.of not in ("time", "constant")]
        return (self.timestep_arg, *dict.fromkeys(others))

    def model_time(self, sigma: Any) -> Any:
        """The model's time argument at ``sigma``."""
        return self.time_scale * sigma + self.time_offset

    def sigma(self, model_time: Any) -> Any:
        """The inverse of ``model_time``."""
        return (model_time - self.time_offset) / self.time_scale
