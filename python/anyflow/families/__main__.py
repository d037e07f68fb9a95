"""``python -m anyflow.families``: the table of docs/families.md, made from the specs."""

from __future__ import annotations

from .spec import EmbedderSite, FamilySpec, NativeTime, Sinusoid
from .table import SPECS

INTRODUCTION = """\
# Families

What `anyflow.patch` knows of each diffusers class. This file is made from the specs in
`python/anyflow/families/table.py` by `python -m anyflow.families > docs/families.md`; a test compares the two.

* **time**: the time argument of forward as a function of sigma (1 = noise), and the shapes that it may have besides the
  ones in brackets: B samples, F latent frames, S tokens.
* **predicts**: `noise - x0` (the noiseward velocity), or its opposite.
* **embedders**: what is cloned, and what feeds it. The clone is `delta_embedder`, a sibling, unless another name stands
  behind the arrow. For a class that has a second time itself, the argument that `r_timestep` becomes.
* **rules**: further calls and rows of the embedder, which are of other times or of fixed ones (r = t there).
"""


def document() -> str:
    lines = [INTRODUCTION, "| class | time | predicts | embedders | rules |", "|---|---|---|---|---|"]
    for spec in sorted(SPECS, key=lambda spec: spec.class_name):
        cells = (f"`{spec.class_name}`", _time(spec), _prediction(spec), _embedders(spec), _rules(spec))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _time(spec: FamilySpec) -> str:
    scale = {1.0: "sigma", -1.0: "-sigma"}.get(spec.time_scale, f"{spec.time_scale:g} sigma")
    offset = f" {'+' if spec.time_offset > 0 else '-'} {abs(spec.time_offset):g}" if spec.time_offset else ""
    shapes = ["[B]"] if spec.per_sample and spec.times != "packed" else []
    more = {
        "sample": [],
        "patches": ["[B, S]"],
        "tokens": ["[B, S]"],
        "frames": [f"[{', '.join(spec.frames.split())}]"],
        "packed": ["one for each token or level of the packed sequence"],
    }
    return f"`{spec.timestep_arg}` = {scale}{offset}; {', '.join([*shapes, *more[spec.times]])}"


def _prediction(spec: FamilySpec) -> str:
    return "noise - x0" if spec.prediction_sign == 1 else "x0 - noise"


def _embedders(spec: FamilySpec) -> str:
    described = [_native(spec.native)] if spec.native is not None else [_site(site) for site in spec.sites]
    for condition, changes in spec.variants:
        named = " and ".join(f"{key}={value!r}" for key, value in condition.items())
        if changes.get("native") is not None:
            described.append(f"with `{named}`: {_native(changes['native'])}")
        elif "sites" in changes:
            described.append(f"with `{named}`: {', '.join(map(_site, changes['sites']))}")
    return "; ".join(described)


def _site(site: EmbedderSite) -> str:
    if site.sinusoid is None:
        fed = "takes times"
    else:
        fed = "from a function" if isinstance(site.sinusoid, Sinusoid) else f"from `{site.sinusoid}`"
    clone = "" if site.delta_name == "delta_embedder" else f" → `{site.delta_name}`"
    return f"`{site.embedder}` ({fed}){clone}"


def _native(native: NativeTime) -> str:
    return f"its own `{native.arg}`, embedded by `{native.delta}`"


def _rules(spec: FamilySpec) -> str:
    rules = []
    for site in spec.sites:
        for rows in site.calls:
            condition = [f"{key}={value!r}" for key, value in rows.when.items()]
            when = f" when `{' and '.join(condition)}`".replace("='given'", " is given") if condition else ""
            if rows.of == "constant":
                rules.append(f"a call of fixed times{when}")
            elif rows.of != "time":
                rules.append(f"`{rows.of}`{when}, with `r_{rows.of}`")
            if rows.constant_tail:
                rules.append(f"rows of a fixed time after the batch's{when}")
        if site.whole_times:
            rules.append("times are truncated to integers")
    if spec.time_dtype == "model":
        rules.append("the stock forward takes times in the model's dtype only; with r, any")
    if spec.checkpointed:
        rules.append("not with gradient checkpointing")
    if spec.time_before_shift:
        rules.append("the stock pipeline tells its model the times from before its shift: a distiller warns")
    if spec.learned_sigma:
        rules.append("the second half of the output is a variance")
    rules += [f"refused: {why}" for _, why in spec.refused]
    rules += [f"refused in `{name}`: {why}" for name, why in spec.refused_pipelines]
    rules += [f"left: `{path}`, {why}" for path, why in spec.left]
    return "; ".join(rules)


if __name__ == "__main__":
    print(document(), end="")
