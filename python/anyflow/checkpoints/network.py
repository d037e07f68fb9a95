"""A LyCORIS network, which keeps its weights outside of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters import lycoris_layers

PREFIX = "lycoris."


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """lycoris.<name> -> tensor. Not the network's own ``state_dict``, which multiplies some tensors together."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items() if not name.endswith("dtype_tensor")}


def describe(bare: nn.Module, network: Any) -> str:
    """JSON of what the tensors of ``network`` mean: each layer's place in the model, its kind, scale and multiplier."""
    paths = {id(module): path for path, module in bare.named_modules()}
    places = {id(layer): paths[id(module)] for module, around in lycoris_layers(bare) for layer in around}
    layers = {
        layer.lora_name: {
            "path": places.get(id(layer)),
            "kind": type(layer).__name__,
            "scale": _number(getattr(layer, "scale", None)),
            "bypass": bool(getattr(layer, "bypass_mode", False)),
            "multiplier": _number(layer.multiplier),
        }
        for layer in getattr(network, "loras", ())
    }
    unplaced = sorted(name for name, layer in layers.items() if layer["path"] is None)
    if unplaced:
        raise ValueError(f"the LyCORIS layers {unplaced} are not applied to this {type(bare).__name__}")
    return json.dumps({"multiplier": _number(getattr(network, "multiplier", None)), "layers": layers})


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def plan_network(
    where: str, bare: nn.Module, network: Any, tensors: Mapping[str, Tensor], described: str | None
) -> Callable[[], None]:
    """Check that the tensors of a file are those of ``network``; what is returned puts them in. Else ValueError."""
    if described is None:
        if network is not None:
            raise ValueError(f"{where} holds no LyCORIS network")
        return lambda: None
    saved = json.loads(described)
    if network is None:
        raise ValueError(
            f"{where} holds a LyCORIS network of {len(saved['layers'])} layers: make the network as in training, "
            "apply it to the model, and pass it as lycoris=network"
        )
    _check_layers(where, json.loads(describe(bare, network))["layers"], saved["layers"])
    own = network_state(network)
    unfit = sorted(own.keys() ^ tensors.keys())
    unfit += sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
    if unfit:
        raise ValueError(f"{where} does not fit the LyCORIS network; nothing was loaded. Missing or misshapen: {unfit}")

    def put() -> None:
        for key, tensor in own.items():
            tensor.data = tensors[key].to(tensor.device, copy=True)
        for layer in getattr(network, "loras", ()):
            layer.multiplier = saved["layers"][layer.lora_name]["multiplier"]
        if saved["multiplier"] is not None:
            network.multiplier = saved["multiplier"]

    return put


def _check_layers(where: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """The multiplier may differ: it is loaded."""
    different = [
        f"{name}: {own.get(name)} in the network, {saved.get(name)} in the file"
        for name in sorted(own.keys() | saved.keys())
        if {**own.get(name, {}), "multiplier": 0} != {**saved.get(name, {}), "multiplier": 0}
        or name not in own
        or name not in saved
    ]
    if different:
        raise ValueError(f"{where} holds another LyCORIS network; nothing was loaded. {'; '.join(different)}")
