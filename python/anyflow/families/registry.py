"""Looking a model's spec up by its class."""

from __future__ import annotations

from .spec import FamilySpec
from .table import SPECS

_specs: dict[str, FamilySpec] = {spec.class_name: spec for spec in SPECS}

_HOW_TO_WRITE_A_SPEC = """\
A spec says where time enters the class, for example:

    import anyflow
    from anyflow.families import EmbedderSite, FamilySpec

    anyflow.register_family(
        FamilySpec(
            class_name="{name}",
            time_scale=1000.0,  # the time argument of forward is time_scale * sigma + time_offset
            prediction_sign=1,  # +1: the output is noise - x0; -1: x0 - noise
            timestep_arg="timestep",
            sites=(EmbedderSite("path.of.time_embedder", "path.of.sinusoid"),),
        )
    )

or pass family="..." when the class is a subclass of a known one."""


def families() -> list[str]:
    """The names of all known families: diffusers class names, sorted."""
    return sorted(_specs)


def register_family(spec: FamilySpec) -> None:
    """Add a family, or replace the one of that name, for the rest of the process.

    Raises TypeError when ``spec`` is not a FamilySpec.
    """
    if not isinstance(spec, FamilySpec):
        raise TypeError(f"register_family takes a FamilySpec, got {type(spec).__name__}")
    _specs[spec.class_name] = spec


def find_spec(class_name: str, family: str | None = None) -> FamilySpec:
    """The spec of a class, or of the ``family`` named instead. ValueError that shows how to write one otherwise."""
    wanted = class_name if family is None else family
    if wanted not in _specs:
        raise ValueError(
            f"no family {wanted!r} is known; known are {', '.join(families())}.\n"
            + _HOW_TO_WRITE_A_SPEC.format(name=class_name)
        )
    return _specs[wanted]
