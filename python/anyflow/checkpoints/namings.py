"""What trainers call the delta embedder: data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WAN = "WanTransformer3DModel"


@dataclass(frozen=True)
class Naming:
    """``delta``: the path of the delta embedder beside ``{parent}{embedder}``; ``{delta_name}`` is that of the spec.
    ``used_by``: whose files.
    ``family``: the only class that it is known for; None: every family.
    ``model``: the class of diffusers that the files fit, where it is not that of the family.
    ``repeats``: prefix -> prefix of the tensors that files with this naming may hold a second time.
    """

    delta: str
    used_by: str
    family: str | None = None
    model: str | None = None
    repeats: Mapping[str, str] = field(default_factory=dict)


NAMINGS = {
    "student": Naming("{parent}{delta_name}", "anyflow.save_student"),
    "anyflow": Naming(
        "{parent}delta_embedder",
        "the published AnyFlow checkpoints (AnyFlowTransformer3DModel of diffusers)",
        family=WAN,
        model="AnyFlowTransformer3DModel",
    ),
    "delta-prefix": Naming("{parent}delta_{embedder}", "trainers that name a clone after its source, delta_<source>"),
    "r-embedder": Naming(
        "r_embedder.{embedder}",
        "trainers with a second embedder of times, which shares or repeats the projection behind the first",
        family=WAN,
        repeats={"r_embedder.time_proj.": "condition_embedder.time_proj."},
    ),
}
