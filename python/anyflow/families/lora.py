"""Where the layers that a LoRA is put on do not follow from their names alone: data for ``anyflow.lora_targets``."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = r"(?!)"  # matches no path


@dataclass(frozen=True)
class LoraRule:
    """Exceptions to the general rule, as regular expressions of the paths that layers have inside of a block.

    ``also``: targets that the general rule misses. ``never``: no targets. ``unused``: layers whose result the model
    throws away in its last block, so that they have no gradient there.
    ``time``: paths in the model of embedders of t that the spec does not name, in classes with a second time.
    """

    also: str = NOTHING
    never: str = NOTHING
    unused: str = NOTHING
    time: tuple[str, ...] = ()


_ANYFLOW = LoraRule(time=("condition_embedder.time_embedder",))
_JOY = LoraRule(unused=r"attn\.txt_attn_proj|txt_mlp\..+")

LORA_RULES = {
    "AnyFlowTransformer3DModel": _ANYFLOW,
    "AnyFlowFARTransformer3DModel": _ANYFLOW,
    "Cosmos3OmniTransformer": LoraRule(unused=r"self_attn\.to_(q|out)|mlp\..+"),
    "EasyAnimateTransformer3DModel": LoraRule(unused=r"attn1\.(add_q_proj|to_add_out)|txt_ff\..+"),
    "HunyuanVideo15Transformer3DModel": LoraRule(unused=r"attn\.(add_q_proj|to_add_out)|ff_context\..+"),
    "JoyImageEditTransformer3DModel": _JOY,
    "JoyImageEditPlusTransformer3DModel": _JOY,
    "MochiTransformer3DModel": LoraRule(unused=r"attn1\.add_q_proj"),
    "NucleusMoEImageTransformer2DModel": LoraRule(never=r"img_mlp\.gate"),  # chooses experts
    "PRXTransformer2DModel": LoraRule(also=r"(gate|up|down)_proj"),  # the feed-forward has no module of its own
    "QwenImageTransformer2DModel": LoraRule(unused=r"attn\.(add_q_proj|to_add_out)|txt_mlp\..+"),
    "SD3Transformer2DModel": LoraRule(also=r"attn2\..+", unused=r"attn\.add_q_proj"),  # attn2 is self-attention too
    "SanaWMLTX2RefinerTransformer3DModel": LoraRule(never=r"audio_.+"),  # the audio stream does not run
    "SanaWMTransformer3DModel": LoraRule(never=r"mlp\.inverted_conv\.conv"),  # forward reads attributes of the layer
    "StableCascadeUNet": LoraRule(also=r".*channelwise\.\d"),
}
