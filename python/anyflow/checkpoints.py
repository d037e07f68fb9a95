"""Saving and loading what a student has trained: safetensors, written whole or not at all, loaded strictly."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .patching import delta_parameters, is_patched, patch
from .patching.unwrap import unwrap

STUDENT_FILE = "anyflow_student.safetensors"
FORMAT_VERSION = "1"


def save_student(model: Any, directory: str | Path, *, external_adapter: bool = False) -> Path:
    """Write adapters, delta embedders and what is needed to rebuild them to ``directory``; returns the file.

    With an adapter on the model, the file holds the adapter's tensors, trained copies in modules_to_save and the delta
    embedders; a full-rank student is written whole. Names are those of the bare model. The file appears under its name
    only when it is complete on disk. ``external_adapter``: the adapter is kept outside of the model (LyCORIS), and only
    the delta embedders are written.

    Raises ValueError when the model is not patched.
    """
    bare = _patched(model)
    settings: Any = bare._flowmap
    metadata = {
        "format": "anyflow_student",
        "format_version": FORMAT_VERSION,
        "family": settings.spec.class_name,
        "gate_value": repr(settings.gate_value),
        "deltatime_type": settings.deltatime_type,
        "adapters": json.dumps(_adapter_configs(bare)),
    }
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in student_state(bare, external_adapter).items()
    }
    return write_atomically(Path(directory) / STUDENT_FILE, save(tensors, metadata))


def load_student(model: Any, directory: str | Path, *, external_adapter: bool = False) -> None:
    """Load what ``save_student`` wrote: patches the model and adds its adapters where that has not been done.

    Tensors keep the dtype that they have in the file. Nothing is changed unless everything fits. Raises
    FileNotFoundError; ValueError for a file of another format or family, for a missing or unexpected tensor (all are
    listed), or for one of another shape.
    """
    path = Path(directory) / STUDENT_FILE
    tensors, metadata = read(path)
    if metadata.get("format") != "anyflow_student" or metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not an AnyFlow student of format version {FORMAT_VERSION}: {metadata}")
    bare = unwrap(model)
    name = bare._flowmap.spec.class_name if is_patched(bare) else type(bare).__name__  # type: ignore[union-attr]
    if name != metadata["family"]:
        raise ValueError(f"{path} holds a student of {metadata['family']}, the model is a {name}")
    # Tried on a copy without storage first: a file that does not fit must leave the model as it was.
    weights = [*bare.parameters(), *bare.buffers()]
    skeleton = copy.deepcopy(bare, {id(w): _on_meta(w) for w in weights})
    _rebuild(skeleton, metadata)
    _check_keys(path, student_state(skeleton, external_adapter), tensors)
    _rebuild(bare, metadata)
    own = student_state(bare, external_adapter)
    for key, tensor in tensors.items():
        own[key].data = tensor.to(own[key].device)


def _on_meta(weight: Tensor) -> Tensor:
    empty = torch.empty_like(weight, device="meta")
    return nn.Parameter(empty, weight.requires_grad) if isinstance(weight, nn.Parameter) else empty


def _rebuild(bare: nn.Module, metadata: Mapping[str, str]) -> None:
    """Patch as the file says and add the adapters that are not there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="deltatime_type='t-r'")  # the embedder is about to be replaced
        patch(bare, gate_value=float(metadata["gate_value"]), deltatime_type=metadata["deltatime_type"])
    _add_adapters(bare, json.loads(metadata["adapters"]))


def student_state(bare: nn.Module, external_adapter: bool = False) -> dict[str, Tensor]:
    """name -> tensor of all that a student owns: adapters, trained copies, delta embedders; everything for a
    full-rank student. With ``external_adapter`` the adapter is kept outside of the model (LyCORIS)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    owned = {name for name, _ in delta_parameters(bare)}
    adapted = external_adapter
    for path, module in bare.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapted = True
            parts = tuple(f"{path}.{layer}." for layer in module.adapter_layer_names)
            owned |= {n for n, _ in bare.named_parameters() if n.startswith(parts)}
        elif isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "modules_to_save"):
            owned |= {n for n, _ in bare.named_parameters() if n.startswith(f"{path}.modules_to_save.")}
    state = bare.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not adapted or name in owned}


def _patched(model: Any) -> nn.Module:
    bare = unwrap(model)
    if not is_patched(bare):
        raise ValueError(f"{type(bare).__name__} is not patched; there is no student to save")
    return bare


def _adapter_configs(bare: nn.Module) -> dict[str, Any]:
    configs = getattr(bare, "peft_config", {})
    return {name: json.loads(json.dumps(config.to_dict(), default=_plain)) for name, config in configs.items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _add_adapters(bare: nn.Module, configs: Mapping[str, Any]) -> None:
    from peft import get_peft_config, inject_adapter_in_model

    present = getattr(bare, "peft_config", {})
    for name, values in configs.items():
        if name in present:
            continue
        config = get_peft_config({key: value for key, value in values.items() if value is not None})
        inject_adapter_in_model(config, bare, adapter_name=name)
        if not hasattr(bare, "peft_config"):
            bare.peft_config = {}  # type: ignore[assignment]
        bare.peft_config[name] = config  # type: ignore[index, operator]
        if hasattr(bare, "_hf_peft_config_loaded"):
            bare._hf_peft_config_loaded = True  # type: ignore[assignment]


def _check_keys(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{key}: {list(tensors[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in sorted(own.keys() & tensors.keys())
        if tensors[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path} does not fit the model; nothing was loaded. Missing: {missing}; unexpected: {unexpected}; "
            f"of another shape: {shapes}"
        )


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. FileNotFoundError, or ValueError for a truncated or foreign file."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # the library's own error type is not exported
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def write_atomically(path: Path, content: bytes) -> Path:
    """Write under a temporary name beside it, flush to disk, rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path
