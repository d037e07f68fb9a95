"""Saving and loading what a student has trained: safetensors, written whole or not at all, loaded strictly."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters import has_adapter, lycoris_layers
from ..distributed import is_sharded, sharded_like
from ..patching import delta_parameters, is_patched, patch, trainable_parameters
from ..patching.names import of_critic
from ..patching.patch import delta_paths
from ..patching.unwrap import unwrap
from .ema import averaged, is_list, plan_list
from .files import Content, on_disk, read, write_tensors
from .layers import (
    adapter_configs,
    add_adapters,
    check_configs,
    check_unmerged,
    flowmap_spec,
    layer_states,
    remove_adapters,
    restore_layers,
    tuner_layers,
)
from .network import PREFIX, describe, network_state, plan_network
from .plain import placed, plain_name, plain_state

STUDENT_FILE = "anyflow_student.safetensors"
EMA_FILE = "anyflow_student_ema.safetensors"
FORMAT_VERSION = "1"


def save_student(model: Any, directory: str | Path, *, lycoris: Any = None, ema: Any = None) -> Path:
    """Write adapters, delta embedders and what is needed to rebuild them to ``directory``; returns the file.

    With an adapter on the model, the file holds the adapter's tensors, trained copies in modules_to_save and the delta
    embedders; a full-rank student is written whole. Names are those of the bare model. The file appears under its name
    only when it is complete on disk.
    ``lycoris``: the LyCORIS network that is applied to the model; its tensors are written under ``lycoris.``.
    Of a model that FSDP2 has sharded, all ranks have to call it, and each writes the whole.
    ``ema``: averaged weights, for a second file of the same format: diffusers' EMAModel over the values of
    ``anyflow.trainable_parameters(model)`` (of the distiller's, with LyCORIS), or a deep copy of the model.

    Raises ValueError when the model is not patched, when a LyCORIS network is on it that is not given, when an adapter
    is merged into the base weights, or when ``ema`` does not average what is trained.
    """
    bare, lycoris = _patched(model), _bare_network(lycoris)
    files = {Path(directory) / STUDENT_FILE: _content(bare, lycoris)}
    if ema is not None:
        files[Path(directory) / EMA_FILE] = _averaged_content(bare, lycoris, ema)
    write_tensors(files)
    return Path(directory) / STUDENT_FILE


def load_student(
    model: Any,
    directory: str | Path,
    *,
    lycoris: Any = None,
    ema: Any = None,
    which: Literal["student", "ema"] = "student",
    adapters: bool = True,
) -> None:
    """Load what ``save_student`` wrote: patches the model and adds its adapters where that has not been done.

    Tensors keep the dtype that they have in the file. A delta embedder that is laid out otherwise than in the file
    (plain, under a LoRA, in modules_to_save) is given the same effective weights: what is folded is rounded once, all
    else is equal to the bit. Nothing is changed unless everything fits.
    ``lycoris``: the network, made as in training and applied to the model.
    ``ema``: an EMAModel, or a copy of the model, which is given the averaged weights and counters.
    ``which``: "ema" loads the averaged weights into ``model``.
    ``adapters=False``: gate, type and the delta embedders alone; the adapter is loaded by other means, for example
    ``pipe.load_lora_weights`` of what ``export_lora`` wrote.

    Raises FileNotFoundError; ValueError for a file of another format or family, for a missing or unexpected tensor (all
    are listed), or for one of another shape or meaning.
    """
    if which not in ("student", "ema"):
        raise ValueError(f"which must be 'student' or 'ema', got {which!r}")
    lycoris = _bare_network(lycoris)
    average = Path(directory) / EMA_FILE
    source = average if which == "ema" else Path(directory) / STUDENT_FILE
    loads = [_plan(unwrap(model), source, lycoris, adapters)]
    if ema is not None:
        tensors, metadata = _read_student(average)
        loads.append(
            plan_list(str(average), ema, tensors, metadata) if is_list(ema) else _plan(unwrap(ema), average, None, True)
        )
    for load in loads:
        load()


def student_state(bare: nn.Module, adapted: bool | None = None) -> dict[str, Tensor]:
    """name -> tensor of all that a student owns within the model: adapters (never a critic's), trained copies, delta
    embedders; everything for a full-rank student. ``adapted``: whether it has an adapter, where that cannot be seen."""
    owned = {name for name, _ in delta_parameters(bare)}
    for path, layer in tuner_layers(bare):
        inside = getattr(layer, "adapter_layer_names", ("modules_to_save",))
        parts = tuple(f"{path}.{part}." for part in inside)
        owned |= {name for name, _ in bare.named_parameters() if name.startswith(parts) and not of_critic(name)}
    if adapted is None:
        adapted = has_adapter(bare)
    state = bare.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not adapted or name in owned}


def _patched(model: Any) -> nn.Module:
    bare = unwrap(model)
    if not is_patched(bare):
        raise ValueError(f"{type(bare).__name__} is not patched; there is no student to save")
    return bare


def _bare_network(lycoris: Any) -> Any:
    return None if lycoris is None else unwrap(lycoris)


def _content(bare: nn.Module, lycoris: Any) -> Content:
    check_unmerged(bare)
    if lycoris is None and next(lycoris_layers(bare), None) is not None:
        raise ValueError("a LyCORIS network is applied to this model and keeps its own weights: pass lycoris=network")
    settings: Any = bare._flowmap
    configs = adapter_configs(bare)
    adapted = lycoris is not None or has_adapter(bare)
    if not adapted and any(of_critic(name) for name, _ in bare.named_parameters()):
        raise ValueError("the critic is an adapter on a full-rank student: put it on the teacher, or make it a network")
    metadata = {
        "format": "anyflow_student",
        "format_version": FORMAT_VERSION,
        "family": settings.spec.class_name,
        "time_scale": repr(settings.spec.time_scale),
        "gate_value": repr(settings.gate_value),
        "deltatime_type": settings.deltatime_type,
        "holds": "adapter" if adapted else "everything",
        "adapters": json.dumps(configs),
        "layers": json.dumps(layer_states(bare)),
    }
    tensors = student_state(bare, adapted)
    if lycoris is not None:
        metadata["lycoris"] = describe(bare, lycoris)
        tensors |= network_state(lycoris)
    return on_disk(tensors), metadata


def _averaged_content(bare: nn.Module, lycoris: Any, ema: Any) -> Content:
    tensors, metadata = _content(bare, lycoris)
    if is_list(ema):
        average, counters = averaged(ema, _trained(bare, lycoris))
        lost = sorted(average.keys() - tensors.keys())
        if lost:
            raise ValueError(f"{lost} are trained, but belong neither to an adapter nor to a delta embedder")
        return {**tensors, **on_disk(average)}, {**metadata, **counters}
    if lycoris is not None:
        raise ValueError("with LyCORIS, average by an EMAModel over the values of distiller.trainable_parameters()")
    copied, copied_metadata = _content(_patched(ema), None)
    if copied.keys() != tensors.keys() or copied_metadata["family"] != metadata["family"]:
        raise ValueError(f"ema is no copy of the student: {sorted(copied.keys() ^ tensors.keys())}")
    return copied, copied_metadata


def _trained(bare: nn.Module, lycoris: Any) -> list[tuple[str, nn.Parameter]]:
    """As ``trainable_parameters`` of the distiller lists them."""
    if lycoris is None:
        return trainable_parameters(bare)
    network = [(f"{PREFIX}{name}", parameter) for name, parameter in lycoris.named_parameters()]
    return [*network, *((name, p) for name, p in delta_parameters(bare) if p.requires_grad)]


def _read_student(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read(path)
    if metadata.get("format") != "anyflow_student" or metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not an AnyFlow student of format version {FORMAT_VERSION}: {metadata}")
    lost = sorted({"family", "gate_value", "deltatime_type", "adapters"} - metadata.keys())
    if lost:
        raise ValueError(f"the header of {path} lacks {lost}")
    return tensors, metadata


def _plan(bare: nn.Module, path: Path, lycoris: Any, adapters: bool) -> Callable[[], None]:
    """Check on copies without storage that everything fits; what is returned then loads it."""
    tensors, metadata = _read_student(path)
    fitting = [flowmap_spec(bare).class_name] if is_patched(bare) else [kind.__name__ for kind in type(bare).__mro__]
    if metadata["family"] not in fitting:
        raise ValueError(f"{path} holds a student of {metadata['family']}, the model is a {type(bare).__name__}")
    network = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    inside = {key: tensor for key, tensor in tensors.items() if key not in network}
    make_values = _values_of_sharded if any(map(is_sharded, bare.parameters())) else _values
    values = make_values(path, bare, inside, metadata, adapters)
    load_network = plan_network(str(path), bare, lycoris, network, metadata.get("lycoris")) if adapters else None

    def load() -> None:
        flags = [(p, p.requires_grad) for _, layer in tuner_layers(bare) for p in layer.parameters()]
        _rebuild(bare, metadata, adapters)
        own = bare.state_dict(keep_vars=True)
        for key, tensor in values.items():
            _put(own[key], tensor)
        if adapters:
            restore_layers(bare, json.loads(metadata.get("layers", "{}")))
        for parameter, flag in flags:  # what was there trains as it did; peft decides about what is new
            parameter.requires_grad_(flag)
        if load_network is not None:
            load_network()

    return load


def _values(
    path: Path, bare: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], adapters: bool
) -> dict[str, Tensor]:
    """key in the model -> its new value."""
    configs = json.loads(metadata["adapters"])
    saved = _skeleton(bare)
    remove_adapters(saved)
    _rebuild(saved, metadata, skeleton=True)
    _check_keys(path, _owned(saved, metadata), tensors)
    future = _skeleton(bare)
    if adapters:
        check_configs(bare, configs)
    _rebuild(future, metadata, adapters, skeleton=True)
    deltas = tuple(f"{delta}." for delta in delta_paths(flowmap_spec(saved)))
    values = {key: tensor for key, tensor in tensors.items() if adapters and not key.startswith(deltas)}
    if adapters:
        own = _owned(future, metadata)
        _check_keys(path, {key: tensor for key, tensor in own.items() if not key.startswith(deltas)}, values)
    saved.load_state_dict(dict(tensors), strict=False, assign=True)
    restore_layers(saved, json.loads(metadata.get("layers", "{}")))
    for delta in deltas:
        values |= _delta_values(path, saved, future, delta, tensors, adapters)
    return values


def _values_of_sharded(
    path: Path, bare: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], adapters: bool
) -> dict[str, Tensor]:
    """FSDP2 lets a model be neither copied nor rebuilt: it has to be laid out as in the file already."""
    configs = json.loads(metadata["adapters"])
    if not is_patched(bare) or not adapters or configs.keys() != adapter_configs(bare).keys():
        raise ValueError(
            f"{path} has the adapters {sorted(configs)}: patch, and add them, before FSDP shards the model"
        )
    check_configs(bare, configs)
    _check_keys(path, _owned(bare, metadata), tensors)
    return dict(tensors)


@torch.no_grad()
def _put(own: Tensor, tensor: Tensor) -> None:
    if is_sharded(own):  # FSDP keeps the storage
        own.copy_(sharded_like(tensor, own))
    else:
        own.data = tensor.to(own.device, copy=True)


def _delta_values(
    path: Path, saved: nn.Module, future: nn.Module, delta: str, tensors: Mapping[str, Tensor], adapters: bool
) -> dict[str, Tensor]:
    """key -> value of one delta embedder, laid out as in the model."""
    source, target = saved.get_submodule(delta[:-1]), future.get_submodule(delta[:-1])
    within = {key.removeprefix(delta): tensor for key, tensor in tensors.items() if key.startswith(delta)}
    base = plain_state(source, adapted=False)
    if adapters and target.state_dict().keys() == within.keys():
        _check_keys(path, target.state_dict(), within, delta)
        found = within
    elif adapters:
        found = placed(target, plain_state(source), base)
    else:  # a LoRA on it comes with the adapter; trained copies do not
        copies = {plain_name(key): tensor for key, tensor in within.items() if "modules_to_save." in key}
        weights = {**base, **copies}
        found = {key: weights[plain_name(key)] for key in target.state_dict() if plain_name(key) in weights}
    return {f"{delta}{key}": tensor for key, tensor in found.items()}


def _skeleton(bare: nn.Module) -> nn.Module:
    """A copy without storage: a file that does not fit must leave the model as it was."""
    around = [layer for _, layers in lycoris_layers(bare) for layer in layers]
    weights = [tensor for module in (bare, *around) for tensor in (*module.parameters(), *module.buffers())]
    return copy.deepcopy(bare, {id(weight): _on_meta(weight) for weight in weights})


def _on_meta(weight: Tensor) -> Tensor:
    empty = torch.empty_like(weight, device="meta")
    return nn.Parameter(empty, weight.requires_grad) if isinstance(weight, nn.Parameter) else empty


def _rebuild(bare: nn.Module, metadata: Mapping[str, str], adapters: bool = True, skeleton: bool = False) -> None:
    """Patch as the file says and add the adapters that are not there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="deltatime_type='t-r'")  # the embedder is about to be replaced
        patch(
            bare,
            gate_value=float(metadata["gate_value"]),
            deltatime_type=metadata["deltatime_type"],
            family=metadata["family"],
        )
    settings: Any = bare._flowmap
    scale = float(metadata.get("time_scale", settings.spec.time_scale))
    if scale != settings.spec.time_scale:
        settings.spec = dataclasses.replace(settings.spec, time_scale=scale)
    if adapters:
        add_adapters(bare, json.loads(metadata["adapters"]), only_names=skeleton)


def _owned(bare: nn.Module, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    return student_state(bare, adapted=True if metadata.get("holds") == "adapter" else None)


def _check_keys(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    missing = sorted(prefix + key for key in own.keys() - tensors.keys())
    unexpected = sorted(prefix + key for key in tensors.keys() - own.keys())
    shapes = [
        f"{prefix}{key}: {list(tensors[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in sorted(own.keys() & tensors.keys())
        if tensors[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path} does not fit the model; nothing was loaded. Missing: {missing}; unexpected: {unexpected}; "
            f"of another shape: {shapes}"
        )
