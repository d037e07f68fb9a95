"""The specs. Adding a class is adding an entry."""

from .spec import CONSTANT, GIVEN, TIME, EmbedderSite, FamilySpec, NativeTime, Rows, Sinusoid

_GUIDANCE = "embeds the guidance scale, not a time"
_REFINER = ("context_embedder.time_text_embed", "the text refiner's own embedding of t")
_UNET_LEFT = (("add_embedding", "embeds sizes, crops and pooled text, not a time"),)
_WAN = (EmbedderSite("condition_embedder.time_embedder", "condition_embedder.timesteps_proj"),)
_ANYFLOW = NativeTime("r_timestep", "condition_embedder.delta_embedder", required=True)

SPECS = (
    # Wan and its relatives
    FamilySpec(
        class_name="WanTransformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
        times="patches",
    ),
    FamilySpec(
        class_name="WanVACETransformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
    ),
    FamilySpec(
        class_name="WanAnimateTransformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
    ),
    FamilySpec(
        class_name="WanAnimate2Transformer3DModel",
        time_scale=1000.0,
        # The pass that fills the cache of the reference runs at the fixed time 1, whatever it is given.
        sites=(
            EmbedderSite(
                "time_embedding",
                "timesteps_proj",
                calls=(Rows("constant", when={"kv_cache_mode": "extract"}), Rows(unless={"kv_cache_mode": "extract"})),
            ),
        ),
        sample_layout="videos",
    ),
    FamilySpec(
        class_name="SkyReelsV2Transformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
        times="frames",
    ),
    FamilySpec(
        class_name="ChronoEditTransformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
    ),
    FamilySpec(
        class_name="AnyFlowTransformer3DModel",
        time_scale=1000.0,
        sites=(),
        native=_ANYFLOW,
        times="frames",
        frame_dim=1,
        per_sample=False,
    ),
    FamilySpec(
        class_name="AnyFlowFARTransformer3DModel",
        time_scale=1000.0,
        sites=(),
        native=_ANYFLOW,
        times="frames",
        frame_dim=1,
        per_sample=False,
    ),
    FamilySpec(
        class_name="HeliosTransformer3DModel",
        time_scale=1000.0,
        # The tokens of the history come first, at time 0.
        sites=(
            EmbedderSite(
                "condition_embedder.time_embedder",
                "condition_embedder.timesteps_proj",
                calls=(
                    Rows("constant", when={"indices_hidden_states": GIVEN, "zero_history_timestep": True}),
                    TIME,
                ),
            ),
        ),
    ),
    FamilySpec(
        class_name="JoyImageEditTransformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
    ),
    FamilySpec(
        class_name="JoyImageEditPlusTransformer3DModel",
        time_scale=1000.0,
        sites=_WAN,
    ),
    # FLUX and its relatives
    FamilySpec(
        class_name="FluxTransformer2DModel",
        time_scale=1.0,
        guidance_off={"true_cfg_scale": 1.0},
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj", pre_scale=1000.0),),
        left=(("time_text_embed.guidance_embedder", _GUIDANCE),),
    ),
    FamilySpec(
        class_name="Flux2Transformer2DModel",
        time_scale=1.0,
        guidance_off={},
        variants=(({"guidance_embeds": False}, {"guidance_off": {"guidance_scale": 1.0}}),),
        # The tokens of reference images have a fixed time when their keys and values are extracted.
        sites=(
            EmbedderSite(
                "time_guidance_embed.timestep_embedder",
                "time_guidance_embed.time_proj",
                pre_scale=1000.0,
                calls=(TIME, CONSTANT),
            ),
        ),
        left=(("time_guidance_embed.guidance_embedder", _GUIDANCE),),
    ),
    FamilySpec(
        class_name="Flux3Transformer2DModel",
        time_scale=1.0,
        # The tokens of text and reference images are at time 0.
        sites=(EmbedderSite("timestep_embedder", "time_proj", pre_scale=1000.0, calls=(TIME, CONSTANT)),),
        variants=(
            (
                {"flow_map": True},
                {
                    "sites": (),
                    "native": NativeTime(
                        "target_timestep",
                        "target_timestep_embedder",
                        required=True,
                        embeds=(
                            (
                                EmbedderSite(
                                    "timestep_embedder", "time_proj", pre_scale=1000.0, calls=(TIME, CONSTANT)
                                ),
                                "t",
                            ),
                            (EmbedderSite("target_timestep_embedder", "time_proj", pre_scale=1000.0), "r"),
                        ),
                    ),
                },
            ),
        ),
    ),
    FamilySpec(
        class_name="ChromaTransformer2DModel",
        time_scale=1.0,
        # No embedder of its own: the network that makes every modulation vector is what sees the time.
        sites=(EmbedderSite("distilled_guidance_layer", "time_text_embed", pre_scale=1000.0),),
    ),
    FamilySpec(
        class_name="LongCatImageTransformer2DModel",
        time_scale=1.0,
        sites=(EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj", pre_scale=1000.0),),
    ),
    FamilySpec(
        class_name="OvisImageTransformer2DModel",
        time_scale=1.0,
        sites=(EmbedderSite("timestep_embedder", "time_proj", pre_scale=1000.0),),
    ),
    FamilySpec(
        class_name="BriaTransformer2DModel",
        time_scale=1000.0,
        replace_grid=True,
        sites=(EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"),),
        left=(("guidance_embed", _GUIDANCE),),
    ),
    FamilySpec(
        class_name="BriaFiboTransformer2DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"),),
        left=(("guidance_embed", _GUIDANCE),),
    ),
    FamilySpec(
        class_name="BriaFibo2Transformer2DModel",
        time_scale=1.0,
        # The gist and the context are at time 0.
        sites=(EmbedderSite("t_embedder", None, pre_scale="t_scale", calls=(TIME, CONSTANT)),),
    ),
    # Image models with joint attention
    FamilySpec(
        class_name="SD3Transformer2DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj"),),
        left=(("image_proj", "the IP-Adapter's own embedding of t"),),
    ),
    FamilySpec(
        class_name="AuraFlowTransformer2DModel",
        time_scale=1.0,
        sites=(EmbedderSite("time_step_proj", "time_step_embed"),),
    ),
    FamilySpec(
        class_name="QwenImageTransformer2DModel",
        time_scale=1.0,
        # With zero_cond_t, condition images have rows of their own at time 0, after those of the batch.
        sites=(
            EmbedderSite(
                "time_text_embed.timestep_embedder",
                "time_text_embed.time_proj",
                calls=(Rows(constant_tail=True, when={"zero_cond_t": True}), Rows(unless={"zero_cond_t": True})),
            ),
        ),
        left=(("time_text_embed.addition_t_embedding", "embeds a kind of condition, not a time"),),
    ),
    FamilySpec(
        class_name="QwenImage21Transformer2DModel",
        time_scale=1.0,
        predicts_text=True,
        # With causal_condition, text and condition images share one row at time 0, after those of the batch.
        sites=(
            EmbedderSite(
                "time_text_embed.timestep_embedder",
                # What its module computes, whose table of frequencies is rounded along with the model.
                Sinusoid(256),
                pre_scale=1000.0,
                calls=(
                    Rows(constant_tail=True, when={"causal_condition": True}),
                    Rows(unless={"causal_condition": True}),
                ),
            ),
        ),
    ),
    FamilySpec(
        class_name="NucleusMoEImageTransformer2DModel",
        time_scale=1.0,
        prediction_sign=-1,
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj"),),
    ),
    FamilySpec(
        class_name="HunyuanImageTransformer2DModel",
        time_scale=1000.0,
        time_dtype="model",
        sites=(EmbedderSite("time_guidance_embed.timestep_embedder", "time_guidance_embed.time_proj"),),
        variants=(
            (
                {"use_meanflow": True},
                {
                    "sites": (),
                    "native": NativeTime(
                        "timestep_r",
                        "time_guidance_embed.timestep_embedder_r",
                        embeds=(
                            (
                                EmbedderSite("time_guidance_embed.timestep_embedder", "time_guidance_embed.time_proj"),
                                "t",
                            ),
                            (
                                EmbedderSite(
                                    "time_guidance_embed.timestep_embedder_r", "time_guidance_embed.time_proj_r"
                                ),
                                "r",
                            ),
                        ),
                    ),
                },
            ),
        ),
        left=(("time_guidance_embed.guidance_embedder", _GUIDANCE), _REFINER),
    ),
    FamilySpec(
        class_name="HiDreamImageTransformer2DModel",
        time_scale=1000.0,
        prediction_sign=-1,
        timestep_arg="timesteps",
        sites=(EmbedderSite("t_embedder.timestep_embedder", "t_embedder.time_proj"),),
    ),
    FamilySpec(
        class_name="ZImageTransformer2DModel",
        time_scale=-1.0,
        guidance_off={"guidance_scale": 0.0},
        time_offset=1.0,
        prediction_sign=-1,
        timestep_arg="t",
        sample_arg="x",
        sample_layout="list",
        # With several images (omni) the embedder is called again for the clean ones, at the fixed time 1.
        sites=(EmbedderSite("t_embedder", None, pre_scale="t_scale", calls=(TIME, CONSTANT)),),
    ),
    FamilySpec(
        class_name="Lumina2Transformer2DModel",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        sites=(EmbedderSite("time_caption_embed.timestep_embedder", "time_caption_embed.time_proj"),),
    ),
    FamilySpec(
        class_name="LuminaNextDiT2DModel",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        learned_sigma=True,
        sites=(EmbedderSite("time_caption_embed.timestep_embedder", "time_caption_embed.time_proj"),),
    ),
    FamilySpec(
        class_name="SanaTransformer2DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj"),),
        variants=(
            (
                {"guidance_embeds": True},
                {"sites": (EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"),)},
            ),
        ),
        refused=(
            (
                {"guidance_embeds": True, "timestep_scale": 1000.0},
                "Sana-Sprint is a TrigFlow model: its time is sin(s) / (sin(s) + cos(s)), not linear in sigma",
            ),
        ),
        refused_pipelines=(
            ("SanaSprintPipeline", "TrigFlow: its time is not linear in sigma"),
            ("SanaSprintImg2ImgPipeline", "TrigFlow: its time is not linear in sigma"),
        ),
        left=(("time_embed.guidance_embedder", _GUIDANCE),),
    ),
    FamilySpec(
        class_name="CogView4Transformer2DModel",
        time_scale=1000.0,
        replace_grid=True,
        time_before_shift=True,
        sites=(EmbedderSite("time_condition_embed.timestep_embedder", "time_condition_embed.time_proj"),),
        left=(("time_condition_embed.condition_embedder", "embeds sizes and crops, not a time"),),
    ),
    FamilySpec(
        class_name="GlmImageTransformer2DModel",
        time_scale=1000.0,
        replace_grid=True,
        time_before_shift=True,
        time_offset=-1.0,
        sites=(EmbedderSite("time_condition_embed.timestep_embedder", "time_condition_embed.time_proj"),),
        left=(("time_condition_embed.condition_embedder", "embeds sizes and crops, not a time"),),
    ),
    FamilySpec(
        class_name="ErnieImageTransformer2DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embedding", "time_proj"),),
    ),
    FamilySpec(
        class_name="Ideogram4Transformer2DModel",
        time_scale=-1.0,
        guidance_off={"guidance_scale": 1.0, "guidance_schedule": None},
        replace_grid=True,
        time_offset=1.0,
        prediction_sign=-1,
        time_dtype="model",
        sites=(EmbedderSite("t_embedding", None, first_linear="mlp_in"),),
        times="tokens",
    ),
    FamilySpec(
        class_name="OmniGenTransformer2DModel",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        # The same features go into the modulation of the output and into a token of the sequence.
        sites=(
            EmbedderSite("t_embedder", "time_proj"),
            EmbedderSite("time_token", "time_proj", delta_name="delta_time_token"),
        ),
    ),
    FamilySpec(
        class_name="Krea2Transformer2DModel",
        time_scale=1.0,
        guidance_off={"guidance_scale": 0.0},
        sites=(EmbedderSite("time_embed", None),),
    ),
    FamilySpec(
        class_name="PRXTransformer2DModel",
        time_scale=1.0,
        sites=(EmbedderSite("time_in", Sinusoid(256, scale="time_factor", max_period="time_max_period")),),
    ),
    FamilySpec(
        class_name="PixArtTransformer2DModel",
        time_scale=1000.0,
        learned_sigma=True,
        sites=(EmbedderSite("adaln_single.emb.timestep_embedder", "adaln_single.emb.time_proj"),),
    ),
    # Video
    FamilySpec(
        class_name="LTXVideoTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj"),),
        times="tokens",
    ),
    FamilySpec(
        class_name="LTX2VideoTransformer3DModel",
        time_scale=1000.0,
        guidance_off={
            "guidance_scale": 1.0,
            "guidance_rescale": 0.0,
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "audio_guidance_rescale": 0.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
        },
        sites=(
            EmbedderSite("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj"),
            EmbedderSite(
                "audio_time_embed.emb.timestep_embedder",
                "audio_time_embed.emb.time_proj",
                calls=(Rows("audio_timestep"),),
            ),
        ),
        times="tokens",
        left=(
            ("av_cross_attn_video_scale_shift", "modulates the attention between video and audio by t"),
            ("av_cross_attn_audio_scale_shift", "modulates the attention between video and audio by t"),
            ("av_cross_attn_video_a2v_gate", "modulates the attention between video and audio by t"),
            ("av_cross_attn_audio_v2a_gate", "modulates the attention between video and audio by t"),
            ("prompt_adaln", "modulates the prompt by the sample's sigma"),
            ("audio_prompt_adaln", "modulates the prompt by the sample's sigma"),
        ),
    ),
    FamilySpec(
        class_name="SanaWMLTX2RefinerTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj"),),
        times="tokens",
        per_sample=False,
    ),
    FamilySpec(
        class_name="HunyuanVideoTransformer3DModel",
        time_scale=1000.0,
        guidance_off={"true_cfg_scale": 1.0},
        # With image_condition_type "token_replace", the tokens of the first frame are at time 0.
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj", calls=(TIME, CONSTANT)),),
        left=(("time_text_embed.guidance_embedder", _GUIDANCE), _REFINER),
    ),
    FamilySpec(
        class_name="HunyuanVideoFramepackTransformer3DModel",
        time_scale=1000.0,
        guidance_off={"true_cfg_scale": 1.0},
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj", calls=(TIME, CONSTANT)),),
        left=(("time_text_embed.guidance_embedder", _GUIDANCE), _REFINER),
    ),
    FamilySpec(
        class_name="HunyuanVideo15Transformer3DModel",
        time_scale=1000.0,
        time_dtype="model",
        sites=(EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"),),
        variants=(
            (
                {"use_meanflow": True},
                {
                    "sites": (),
                    "native": NativeTime(
                        "timestep_r",
                        "time_embed.timestep_embedder_r",
                        embeds=(
                            (EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"), "t"),
                            (EmbedderSite("time_embed.timestep_embedder_r", "time_embed.time_proj_r"), "r"),
                        ),
                    ),
                },
            ),
        ),
        left=(_REFINER,),
    ),
    FamilySpec(
        class_name="SanaVideoTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj"),),
        variants=(
            (
                {"guidance_embeds": True},
                {"sites": (EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"),)},
            ),
        ),
        times="patches",
        left=(("time_embed.guidance_embedder", _GUIDANCE),),
    ),
    FamilySpec(
        class_name="SanaWMTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("t_embedder", "time_proj", whole_times=True),),
        times="frames",
        frames="B 1 F",
        per_sample=False,
    ),
    FamilySpec(
        class_name="CosmosTransformer3DModel",
        time_scale=1.0,
        # The normalised features themselves are added to every modulation, past the embedder.
        sites=(
            EmbedderSite("time_embed.t_embedder", "time_embed.time_proj"),
            EmbedderSite("time_embed.norm", "time_embed.time_proj", delta_name="delta_norm"),
        ),
        times="frames",
        frames="B 1 F 1 1",
        refused_pipelines=(
            ("CosmosTextToWorldPipeline", "Cosmos 1 is an EDM model: its time is log(sigma) / 4"),
            ("CosmosVideoToWorldPipeline", "Cosmos 1 is an EDM model: its time is log(sigma) / 4"),
            ("Cosmos2TextToImagePipeline", "Cosmos 2 is preconditioned, and its time is sigma / (1 + sigma)"),
            ("Cosmos2VideoToWorldPipeline", "Cosmos 2 is preconditioned, and its time is sigma / (1 + sigma)"),
        ),
    ),
    FamilySpec(
        class_name="Cosmos3OmniTransformer",
        time_scale=1000.0,
        timestep_arg="vision_timesteps",
        sample_arg="vision_tokens",
        sample_layout="batches",
        sites=(
            EmbedderSite(
                "time_embedder",
                "time_proj",
                pre_scale="timestep_scale",
                calls=(
                    TIME,
                    Rows("sound_timesteps", when={"sound_tokens": GIVEN}),
                    Rows("action_timesteps", when={"action_tokens": GIVEN}),
                ),
            ),
        ),
        times="packed",
    ),
    FamilySpec(
        class_name="MochiTransformer3DModel",
        time_scale=-1000.0,
        replace_grid=True,
        time_offset=1000.0,
        prediction_sign=-1,
        sites=(EmbedderSite("time_embed.timestep_embedder", "time_embed.time_proj"),),
    ),
    FamilySpec(
        class_name="Kandinsky5Transformer3DModel",
        time_scale=1000.0,
        channels_last=True,
        sites=(EmbedderSite("time_embeddings", None),),
    ),
    FamilySpec(
        class_name="Kandinsky6Transformer3DModel",
        time_scale=1000.0,
        channels_last=True,
        sites=(
            EmbedderSite("video_time_embeddings.timestep_embedder", "video_time_embeddings.time_proj"),
            EmbedderSite("audio_time_embeddings.timestep_embedder", "audio_time_embeddings.time_proj"),
        ),
    ),
    FamilySpec(
        class_name="Kandinsky6SRTransformer3DModel",
        time_scale=1000.0,
        channels_last=True,
        sites=(EmbedderSite("time_embeddings.timestep_embedder", "time_embeddings.time_proj"),),
    ),
    FamilySpec(
        class_name="MiniMaxH3Transformer3DModel",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        # Time is a table of the levels in the packed sequence: rows with equal t and other r are rows of their own.
        sites=(EmbedderSite("time_embedder", "time_proj"),),
        times="packed",
    ),
    FamilySpec(
        class_name="MotifVideoTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_text_embed.timestep_embedder", "time_text_embed.time_proj"),),
    ),
    FamilySpec(
        class_name="EasyAnimateTransformer3DModel",
        time_scale=1000.0,
        sites=(EmbedderSite("time_embedding", "time_proj"),),
    ),
    # Audio
    FamilySpec(
        class_name="AceStepTransformer1DModel",
        time_scale=1.0,
        time_dtype="model",
        sites=(),
        native=NativeTime(
            "timestep_r",
            "time_embed_r",
            required=True,
            embeds=(
                (EmbedderSite("time_embed", None, first_linear="linear_1"), "t"),
                (EmbedderSite("time_embed_r", None, first_linear="linear_1"), "t-r"),
            ),
        ),
    ),
    FamilySpec(
        class_name="LongCatAudioDiTTransformer",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        sites=(EmbedderSite("time_embed", None, first_linear="time_mlp.0"),),
    ),
    FamilySpec(
        class_name="MiniMaxMusic3Transformer1DModel",
        time_scale=-1.0,
        time_offset=1.0,
        prediction_sign=-1,
        time_dtype="model",
        sites=(EmbedderSite("time_embed", "time_proj"),),
    ),
    FamilySpec(
        class_name="StableAudio3DiTModel",
        time_scale=1.0,
        sites=(EmbedderSite("to_timestep_embed", "timestep_features"),),
    ),
    # U-Nets
    FamilySpec(
        class_name="UNet2DConditionModel",
        time_scale=1000.0,
        sample_arg="sample",
        sites=(EmbedderSite("time_embedding", "time_proj"),),
        left=_UNET_LEFT,
    ),
    FamilySpec(
        class_name="DreamLiteUNetModel",
        time_scale=1000.0,
        sample_arg="sample",
        sites=(EmbedderSite("time_embedding", "time_proj"),),
        left=_UNET_LEFT,
    ),
    FamilySpec(
        class_name="StableCascadeUNet",
        time_scale=1.0,
        timestep_arg="timestep_ratio",
        sample_arg="sample",
        time_dtype="model",
        # No embedder: each block has a linear map of the features.
        sites=tuple(
            EmbedderSite(
                f"{blocks}.*.*.mapper",
                "get_timestep_ratio_embedding",
                delta_name="delta_mapper",
            )
            for blocks in ("down_blocks", "up_blocks")
        ),
        checkpointed=True,
    ),
)
