"""The specs. Adding a class is adding an entry."""

from .spec import EmbedderSite, FamilySpec

SPECS = (
    FamilySpec(
        class_name="WanTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("condition_embedder.time_embedder", "condition_embedder.timesteps_proj"),),
        token_times=True,
    ),
    FamilySpec(
        class_name="FluxTransformer2DModel",
        time_scale=1.0,
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj", pre_scale=1000.0),),
        left=(("time_text_embed.guidance_embedder", "embeds the guidance scale, not a time"),),
    ),
    FamilySpec(
        class_name="SD3Transformer2DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj"),),
        left=(("image_proj", "the IP-Adapter's own embedding of t"),),
    ),
    FamilySpec(
        class_name="ZImageTransformer2DModel",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        timestep_arg="t",
        sample_arg="x",
        sample_layout="list",
        # With several images (omni) the embedder is called again for the clean ones, at the fixed time 1.
        sites=(EmbedderSite("t_embedder", None, pre_scale="t_scale", calls=("flow", "constant")),),
    ),
    FamilySpec(
        class_name="UNet2DConditionModel",
        time_scale=1000.0,
        sample_arg="sample",
        sites=(EmbedderSite("time_embedding", "time_proj"),),
        left=(("add_embedding", "embeds sizes, crops and pooled text, not a time"),),
    ),
)
