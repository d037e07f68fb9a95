"""What the published recipe puts a LoRA on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..families import FamilySpec
from ..families.lora import LORA_RULES, LoraRule
from ..patching import is_patched
from ..patching.patch import delta_paths
from ..patching.unwrap import unwrap

# Names of modules inside of a block, from its root to the layer.
_ATTENTION = re.compile(r"(\w+_)?(attn|attention)(_\w+|\d)?")
_CROSS = re.compile(r"(\w+_)?attn2|\w*cross\w*|\w+_to_\w+_attn")
_GATE = re.compile(r"(to_|output_)?gate(_proj)?|beta_proj")
_FEED_FORWARD = re.compile(r"(\w+_)?(ff|ffn|mlp|feed_forward)(_\w+)?")
# Names on the way to blocks that work on the conditioning alone.
_CONDITION = re.compile(r"\w*(context|text|txt|token|siglip|perceiver|caption|condition|image_embedder)\w*")


def lora_targets(model: nn.Module) -> list[str]:
    """Where the published recipe puts a LoRA: full names of layers, for ``target_modules`` of peft.

    These are the projections of self-attention (also where text joins in one attention with the image), the
    feed-forward, and the embedders of time and delta time; nothing in cross-attention, in blocks that refine the
    conditioning, in norms, patch embedders and output heads, nor experts that are one stacked parameter.

    ``model``: a patched model, bare or wrapped, with or without adapters. Raises ValueError for one that is not
    patched: it has no delta embedder yet.

    peft matches the end of a name: layers with a longer name of the same ending are in the list as well, as it would
    take them anyway (the time embedder in the text refiner of HunyuanVideo).
    """
    bare = unwrap(model)
    if not is_patched(bare):
        raise ValueError(f"{type(bare).__name__} is not patched, its delta embedder would be missed: patch first")
    spec: FamilySpec = bare._flowmap.spec  # type: ignore[union-attr, assignment]
    rule = LORA_RULES.get(spec.class_name, LoraRule())
    layers = list(_layers(bare))
    embedders = tuple(f"{path}." for path in _embedders(spec, rule))
    targets = {path for path in layers if f"{path}.".startswith(embedders)} | _in_blocks(layers, rule)
    endings = tuple(f".{path}" for path in targets)
    return [path for path in layers if path in targets or path.endswith(endings)]


def _embedders(spec: FamilySpec, rule: LoraRule) -> list[str]:
    native = () if spec.native is None else spec.native.embeds
    sites = [*spec.sites, *(site for site, _ in native)]
    return [*(site.embedder for site in sites), *delta_paths(spec), *rule.time]


def _layers(model: nn.Module) -> Iterator[str]:
    """Paths of the linear layers, also of those that hold an adapter, and of convolutions that are linear layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = (*inside, f"{path}.")
        if isinstance(module, BaseTunerLayer) or _is_linear(module):
            yield path


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


class _Place(NamedTuple):
    """Where a layer is: in block number ``block`` of the list ``blocks``, at ``inner``."""

    blocks: str
    block: int
    inner: str


def _in_blocks(layers: list[str], rule: LoraRule) -> set[str]:
    """The targets in the model's repeated blocks."""
    places = {path: _Place(m[1], int(m[2]), m[3]) for path in layers if (m := re.match(r"(.*?)\.(\d+)\.(.+)", path))}
    last = {place.blocks: place.block for place in sorted(places.values(), key=lambda place: place.block)}
    targets = set()
    for path, place in places.items():
        unused = re.fullmatch(rule.unused, place.inner) and place.block == last[place.blocks]
        if not unused and _is_target(place, rule):
            targets.add(path)
    # Blocks that run attention and feed-forward side by side have one layer out of both.
    return targets | {path for path in places if re.sub(r"\.proj_out$", ".proj_mlp", path) in targets}


def _is_target(place: _Place, rule: LoraRule) -> bool:
    """Whether a layer is attention or feed-forward. Lists inside of blocks (the transformers of a UNet, the layers of
    a feed-forward) make no difference."""
    names = place.inner.split(".")
    if re.fullmatch(rule.also, place.inner):
        return True
    if any(_CONDITION.fullmatch(name) for name in place.blocks.split(".")) or re.fullmatch(rule.never, place.inner):
        return False
    if any(_CROSS.fullmatch(name) for name in names):
        return False
    if any(_ATTENTION.fullmatch(name) for name in names):
        return not _GATE.fullmatch(names[-1])
    return any(_FEED_FORWARD.fullmatch(name) for name in names)
