"""Renaming the delta embedders of checkpoints, between this library and other trainers, strictly."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import EmbedderSite, find_spec
from .files import read, write_tensors
from .layers import lora_header, lora_scale
from .namings import NAMINGS, WAN, Naming
from .plain import plain_name
from .student import FORMAT_VERSION, STUDENT_FILE

_PREFIXES = ("base_model.model.", "transformer.", "unet.", "module.")
_FACTOR = re.compile(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.[^.]+)*$")
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
_WEIGHT_FILES = (STUDENT_FILE, "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors")
_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass
class Checkpoint:
    """Tensors, and what is known of them. Names are free of wrappers."""

    tensors: dict[str, Tensor]
    family: str
    config: dict[str, Any]  # of the model; empty when it is not known
    conditioning: dict[str, str]  # gate_value, deltatime_type and time_scale, as far as they are known
    lora: dict[str, Any] = field(default_factory=dict)  # the configuration of the LoRA in it


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    family: str | None = None,
    gate_value: float | None = None,
    deltatime_type: str | None = None,
) -> Path:
    """Write the checkpoint ``source`` to the file ``target``, delta embedders named as ``NAMINGS[to]``; returns it.

    ``source``: a safetensors file, or a directory with one (in shards as well, or a pipeline's): a whole model, delta
    embedders alone, or these with one LoRA. Its naming is found out; prefixes of peft, DDP and torch.compile go away.
    Values are not changed.
    ``family``: the class of the model, by default what the source says, else Wan.
    ``gate_value``, ``deltatime_type``: a student file needs them; by default what the source says.

    Checked against the names of the class, exactly where a config.json lies beside the source, otherwise for a default
    model with as many blocks. Raises FileNotFoundError, or ValueError: for files other than safetensors (no pickle is
    ever loaded), missing, unexpected or doubled names (all are listed), or what ``to`` has no place for.
    """
    if to not in NAMINGS:
        raise ValueError(f"to={to!r}: the namings are {', '.join(NAMINGS)}")
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"{target}: the target must be named *.safetensors")
    given = {"gate_value": None if gate_value is None else repr(float(gate_value)), "deltatime_type": deltatime_type}
    checkpoint = _read_checkpoint(Path(source), family)
    checkpoint.conditioning |= {key: value for key, value in given.items() if value is not None}
    naming = NAMINGS[to]
    sites = _sites(checkpoint.family)
    _check_family(checkpoint, to, naming)
    _to_student_names(checkpoint, sites)
    _check_names(checkpoint, naming.model or checkpoint.family, sites)
    content = _student_content(checkpoint, sites) if to == "student" else _other_content(checkpoint, naming, sites)
    write_tensors({Path(target): content})
    return Path(target)


def _read_checkpoint(source: Path, family: str | None) -> Checkpoint:
    files = _weight_files(source)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        part, metadata = read(path)
        doubled = sorted(tensors.keys() & part.keys())
        if doubled:
            raise ValueError(f"{path} holds {doubled} a second time")
        tensors |= part
    if "lycoris" in metadata:
        raise ValueError(f"{source} holds a LyCORIS network, whose tensors have no names in other trainers")
    lora = _lora_config(metadata)
    beside = files[0].parent / "config.json"
    config = json.loads(beside.read_text()) if beside.exists() else {}
    named = metadata.get("family") or config.get("_class_name") or WAN
    known = {**{key: str(config[key]) for key in ("gate_value", "deltatime_type") if key in config}, **metadata}
    return Checkpoint(
        tensors=_bare_names(tensors),
        family=family or (WAN if named == NAMINGS["anyflow"].model else named),
        config=config,
        conditioning={key: known[key] for key in ("gate_value", "deltatime_type", "time_scale") if key in known},
        lora=lora,
    )


def _weight_files(source: Path) -> list[Path]:
    if source.is_dir():
        inside = [source, source / "transformer"]
        for path in (folder / _INDEX for folder in inside):
            if path.exists():
                return sorted({path.parent / name for name in json.loads(path.read_text())["weight_map"].values()})
        found = [path for folder in inside for name in _WEIGHT_FILES if (path := folder / name).exists()]
        if len(found) != 1:
            raise ValueError(f"{source} must hold one of {', '.join(_WEIGHT_FILES)}; it holds {len(found)}")
        return found
    if not source.exists():
        raise FileNotFoundError(source)
    if source.suffix != ".safetensors":
        raise ValueError(f"{source}: only safetensors files are read; a pickle could run any code")
    return [source]


def _bare_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wraps a model, or an adapter's layer. A trained copy of modules_to_save takes the place of its
    original. ValueError when two tensors come to have one name."""
    trained = {plain_name(key) for key in tensors if "modules_to_save." in key}
    found: dict[str, Tensor] = {}
    doubled = []
    for key, tensor in tensors.items():
        if "original_module." in key and plain_name(key) in trained:
            continue
        name = plain_name(key)
        while name.startswith(_PREFIXES):
            name = name.removeprefix(next(prefix for prefix in _PREFIXES if name.startswith(prefix)))
        name = _MAGNITUDE.sub(".lora_magnitude_vector", _FACTOR.sub(r".\1.\2", name))
        if name in found:
            doubled.append(name)
        found[name] = tensor
    if doubled:
        raise ValueError(f"several tensors are named alike without their wrappers: {sorted(doubled)}")
    return found


def _lora_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    if "lora_adapter_metadata" in metadata:
        values = json.loads(metadata["lora_adapter_metadata"])
        return {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in values.items()}
    configs = json.loads(metadata.get("adapters", "{}"))
    if len(configs) > 1:
        raise ValueError(f"the student has the adapters {sorted(configs)}; a converted file holds one")
    for name, config in configs.items():
        _check_convertible(name, config, json.loads(metadata.get("layers", "{}")))
    return next(iter(configs.values()), {})


def _check_convertible(name: str, config: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"the adapter {name!r} is a {config['peft_type']}; of adapters only a LoRA can be converted")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return
    scale = lora_scale(config["lora_alpha"], config["r"], config)
    for path, state in layers.items():
        if abs(state["scaling"].get(name, scale) - scale) > 1e-9 * abs(scale):
            raise ValueError(f"{path} has the adapter {name!r} at another scale than its configuration says")


def _check_family(checkpoint: Checkpoint, to: str, naming: Naming) -> None:
    if naming.family not in (None, checkpoint.family):
        raise ValueError(f"the naming {to!r} is known for {naming.family}, not for {checkpoint.family}")


def _sites(family: str) -> list[EmbedderSite]:
    sites = list(find_spec(family).sites)
    if not sites or any("*" in site.embedder for site in sites):
        raise ValueError(f"{family} has no delta embedder of one name, so there is nothing to convert")
    return sites


def _delta_path(naming: Naming, site: EmbedderSite) -> str:
    parent, dot, embedder = site.embedder.rpartition(".")
    return naming.delta.format(parent=parent + dot, embedder=embedder, delta_name=site.delta_name) + "."


def _to_student_names(checkpoint: Checkpoint, sites: list[EmbedderSite]) -> None:
    """Find out the naming, and undo it. Tensors that it repeats are dropped, if they are equal."""
    namings = [naming for naming in NAMINGS.values() if naming.family in (None, checkpoint.family)]
    paths = [{_delta_path(naming, site): f"{site.delta}." for site in sites} for naming in namings]
    known = sorted({path for renames in paths for path in renames})
    found = {path for path in known if any(key.startswith(path) for key in checkpoint.tensors)}
    fitting = [(naming, renames) for naming, renames in zip(namings, paths, strict=True) if found <= renames.keys()]
    if not found or not fitting:
        what = f"here they have several: {sorted(found)}" if found else f"none of {known} is there"
        raise ValueError(f"the delta embedders of a {checkpoint.family} have names of one kind; {what}")
    naming, renames = fitting[0]
    _drop_repeats(checkpoint.tensors, naming.repeats)
    checkpoint.tensors = _renamed(checkpoint.tensors, renames)


def _drop_repeats(tensors: dict[str, Tensor], repeats: Mapping[str, str]) -> None:
    for prefix, original in repeats.items():
        for key in [key for key in tensors if key.startswith(prefix)]:
            same = original + key.removeprefix(prefix)
            if same not in tensors or not torch.equal(tensors[key], tensors[same]):
                raise ValueError(
                    f"{key} is not equal to {same}; a flow map of this library shares it, so it has no place"
                )
            del tensors[key]


def _renamed(tensors: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    def name(key: str) -> str:
        old = next((old for old in renames if key.startswith(old)), "")
        return renames[old] + key.removeprefix(old) if old else key

    return {name(key): tensor for key, tensor in tensors.items()}


def _check_names(checkpoint: Checkpoint, model: str, sites: Iterable[EmbedderSite]) -> None:
    """ValueError that lists every name that is missing and every one that the class does not have."""
    known = _names_of(model, checkpoint.config)
    deltas = {
        f"{site.delta}.{key.removeprefix(site.embedder + '.')}"
        for site in sites
        for key in known
        if key.startswith(f"{site.embedder}.")
    }
    known -= deltas
    lora = {key for key in checkpoint.tensors if ".lora_" in key}
    base = checkpoint.tensors.keys() - lora - deltas
    expected = set(known)
    if not checkpoint.config:
        expected = _with_blocks_of(known, checkpoint.tensors)
    whole = expected if base else set()
    missing = (deltas | whole) - checkpoint.tensors.keys()
    unexpected = (base - whole) | _stray_factors(lora, expected | deltas)
    missing |= _partners(lora) - lora
    if missing or unexpected:
        raise ValueError(
            f"these are not the tensors of a {model} with a second time. Missing: {sorted(missing)}; "
            f"unexpected: {sorted(unexpected)}"
        )
    if lora and not checkpoint.lora:
        raise ValueError("the header holds no configuration of the LoRA in this checkpoint, so its alpha is unknown")


def _names_of(model: str, config: Mapping[str, Any]) -> set[str]:
    import diffusers

    kind = getattr(diffusers, model, None)
    if kind is None:
        raise ValueError(f"{model} is no class of diffusers, so the names of its tensors are not known")
    accepted = inspect.signature(kind.__init__).parameters
    try:
        with torch.device("meta"):
            return set(kind(**{key: value for key, value in config.items() if key in accepted}).state_dict())
    except TypeError as error:
        raise ValueError(f"a {model} cannot be made without a config.json, which must lie beside the source") from error


def _with_blocks_of(known: Iterable[str], tensors: Iterable[str]) -> set[str]:
    """The names of a class with as many blocks as ``tensors`` have."""
    counts: dict[str, int] = {}
    for key in tensors:
        index = _BLOCK.search(key)
        if index:
            head = key[: index.start()]
            counts[head] = max(counts.get(head, 0), int(index.group()) + 1)
    found = set()
    for key in known:
        index = _BLOCK.search(key)
        head = key[: index.start()] if index else ""
        blocks = range(counts.get(head, 0)) if index else ()
        found |= {f"{head}{block}{key[index.end() :]}" for block in blocks} if index else {key}
    return found


def _stray_factors(lora: Iterable[str], names: Iterable[str]) -> set[str]:
    layers = {name.removesuffix(".weight") for name in names}
    return {key for key in lora if key.partition(".lora_")[0] not in layers}


def _partners(lora: Iterable[str]) -> set[str]:
    """A and B of every layer."""
    return {f"{key.partition('.lora_')[0]}.lora_{factor}.weight" for key in lora for factor in "AB"}


def _student_content(checkpoint: Checkpoint, sites: Iterable[EmbedderSite]) -> tuple[dict[str, Tensor], dict[str, str]]:
    needed = [key for key in ("gate_value", "deltatime_type") if key not in checkpoint.conditioning]
    if needed:
        raise ValueError(f"a student file holds {' and '.join(needed)}, which the source does not tell: give them")
    deltas = tuple(f"{site.delta}." for site in sites)
    base = any(not key.startswith(deltas) and ".lora_" not in key for key in checkpoint.tensors)
    if base and checkpoint.lora:
        raise ValueError("a whole model with a LoRA beside its weights is no student file: merge the LoRA first")
    under = {key.partition(".lora_")[0] for key in checkpoint.tensors if ".lora_" in key}
    adapters = {"default": {"peft_type": "LORA", **checkpoint.lora, "target_modules": sorted(under)}} if under else {}
    metadata = {
        "format": "anyflow_student",
        "format_version": FORMAT_VERSION,
        "family": checkpoint.family,
        "holds": "everything" if base else "adapter",
        "adapters": json.dumps(adapters),
        **checkpoint.conditioning,
    }
    return {_peft_name(key, under): tensor for key, tensor in checkpoint.tensors.items()}, metadata


def _peft_name(key: str, under: set[str]) -> str:
    """The name within a model on which the LoRA ``default`` is."""
    layer, _, rest = key.rpartition(".")
    if layer in under:
        return f"{key}.default.weight" if rest == "lora_magnitude_vector" else f"{layer}.base_layer.{rest}"
    return f"{layer}.default.{rest}" if layer.endswith((".lora_A", ".lora_B")) else key


def _other_content(
    checkpoint: Checkpoint, naming: Naming, sites: Iterable[EmbedderSite]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    renames = {f"{site.delta}.": _delta_path(naming, site) for site in sites}
    tensors = _renamed(checkpoint.tensors, renames)
    metadata = {"format": "pt", "family": checkpoint.family, **checkpoint.conditioning}
    if checkpoint.lora:
        metadata["lora_adapter_metadata"] = lora_header(tensors, checkpoint.lora)
    return tensors, metadata
