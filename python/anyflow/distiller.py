"""What a trainer talks to: configuration -> objective -> batch and loss."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapters import GradientCheck, check_base, has_adapter, lycoris_layers, random_parameters
from .checkpoints import load_student, on_disk, read, save_student, student_state, write_tensors
from .config import AnyFlowConfig
from .critic import Critic
from .denoiser import Denoiser, DiffusersDenoiser, TrainerDenoiser, spec_of
from .families import FamilySpec
from .guard import FiniteSteps
from .layout import TimeLayout, prediction_of, velocity_part
from .patching import delta_parameters, is_patched, patch, trainable_parameters
from .patching.clone import is_quantised
from .patching.patch import delta_paths
from .patching.unwrap import unwrap
from .sampling import AnyStepScheduler
from .stages import Roles, make_stage, model_dtype
from .streams import RandomStreams

STATE_FILE = "anyflow_distiller.safetensors"
NOT_FLOW = ("epsilon", "v_prediction", "sample")


class AnyFlowDistiller:
    """Makes the batches and the loss that turn a flow-matching model into an any-step flow map (arXiv 2605.13724).

    ``teacher_model``: a diffusers model (bare, or wrapped by peft, DDP or torch.compile), or a trainer's object with
        ``model_predict(batch) -> {"model_prediction": Tensor}`` and ``get_trained_component()``. The teacher is that
        network with its adapter off.
    ``student_model``: the network that is trained, when it is another one than the teacher's (full-rank students).
    ``noise_scheduler``: the scheduler of the pipeline, for validation (``get_scheduler``) and to refuse models that
        are not flow-matching.
    ``config``: an ``AnyFlowConfig`` or a dict of its keys.
    ``lycoris``: the LyCORIS network applied to the student, if there is one; by default what a trainer's object has.
    ``critic_model``: for ``target_mode="onpolicy"``, a whole network that is trained as the fake score; by default an
        adapter on the teacher's (``anyflow.add_critic``). The teacher's network starts it: a copy, with trained weights
        of its own.
    ``mesh``: the torch ``DeviceMesh`` of a run in which ranks share samples (context or tensor parallel); or
        ``dp_rank`` and ``dp_size``, this rank's number among those whose samples differ. By default all differ.

    A student that is not patched yet is patched; on one that is, the configuration's gate and type are set where given.
    Its delta embedders are made trainable: take the optimizer's parameters from ``trainable_parameters()``.

    A trainer's object may also have ``prediction_to_noiseward_flow(prediction)`` and
    ``noiseward_flow_to_prediction(flow)``, ``get_flow_matching_target(batch)``, ``accelerator`` (its
    ``_lycoris_wrapped_network`` when ``config.lora_type`` is "lycoris"), ``PREDICTION_TYPE`` and ``pipeline``.

    Raises ValueError for a bad configuration, a model that is not flow-matching or not patchable, text-encoder
    training, or a network that is teacher and student at once without an adapter to switch off.
    """

    def __init__(
        self,
        teacher_model: Any,
        student_model: nn.Module | None = None,
        *,
        noise_scheduler: Any = None,
        config: AnyFlowConfig | Mapping[str, Any] | None = None,
        lycoris: nn.Module | None = None,
        dp_rank: int | None = None,
        dp_size: int | None = None,
        mesh: Any = None,
        critic_model: nn.Module | None = None,
    ) -> None:
        if isinstance(config, AnyFlowConfig):
            defaults = AnyFlowConfig().to_dict()
            given = {key: value for key, value in config.to_dict().items() if value != defaults[key]}
        else:
            given = dict(config or {})
        self.config = AnyFlowConfig.from_dict(given)
        self.noise_scheduler = noise_scheduler
        self.trainer = teacher_model if hasattr(teacher_model, "model_predict") else None
        _refuse_other_than_flow(self.trainer, noise_scheduler)
        self.lycoris = _lycoris_network(self.trainer) if lycoris is None else lycoris
        teacher = teacher_model if self.trainer is None else self.trainer.get_trained_component()
        student = teacher if student_model is None else student_model
        self._patch_student(unwrap(student), given)
        spec = self._spec(unwrap(teacher), unwrap(student))
        self.teacher: Denoiser = (
            DiffusersDenoiser(teacher, spec)
            if self.trainer is None
            else TrainerDenoiser(self.trainer, unwrap(teacher), spec)
        )
        self.student: Denoiser = (
            self.teacher if student_model is None else DiffusersDenoiser(student, self._spec(unwrap(student)))
        )
        self._check_student(student)
        if self.config.forward_mode == "online_teacher" and self.config.teacher_rollout_steps == 1:
            warnings.warn(
                "teacher_rollout_steps=1: one Euler step makes the target the teacher's own velocity, whatever r is; "
                "use 4 or more",
                stacklevel=2,
            )
        if spec.time_before_shift:
            warnings.warn(
                f"the pipeline of {spec.class_name} tells its model the times from before the shift by the resolution; "
                "here teacher and student are told that of sigma itself, another one unless the shift is 1",
                stacklevel=2,
            )
        self.streams = RandomStreams(self.config.seed, dp_rank=dp_rank, dp_size=dp_size, mesh=mesh)
        critic = None if critic_model is None else self._critic_of(critic_model)
        self._roles = Roles(
            self.config, self.streams, self.teacher, self.student, self.trainer, self.lycoris, noise_scheduler, critic
        )
        self._stage = make_stage(self._roles)
        self._gradients = GradientCheck()
        self._guard = FiniteSteps()

    def _patch_student(self, bare: Any, given: Mapping[str, Any]) -> None:
        conditioning = {key: getattr(self.config, key) for key in ("gate_value", "deltatime_type")}
        if is_patched(bare):
            settings = bare._flowmap
            current = {"gate_value": settings.gate_value, "deltatime_type": settings.deltatime_type}
            conditioning = {key: conditioning[key] if key in given else value for key, value in current.items()}
            self.config = AnyFlowConfig.from_dict({**self.config.to_dict(), **conditioning})
        patch(bare, **conditioning)
        bare._flowmap.spec = self._spec(bare)  # so that sampling and every forward go by timestep_scale as well

    def _spec(self, bare: nn.Module, student: nn.Module | None = None) -> FamilySpec:
        spec, scale = spec_of(bare, student), self.config.timestep_scale
        if scale is None or scale == spec.time_scale:
            return spec
        if spec.time_offset:
            raise ValueError(
                f"timestep_scale={scale}: the time argument of {spec.class_name} is {spec.time_scale} * sigma + "
                f"{spec.time_offset}; a scale alone cannot replace that"
            )
        return dataclasses.replace(spec, time_scale=scale)

    def _critic_of(self, critic_model: nn.Module) -> Denoiser:
        critic = DiffusersDenoiser(critic_model, self._spec(unwrap(critic_model)))
        if self.config.target_mode != "onpolicy":
            raise ValueError(f"target_mode={self.config.target_mode!r} has no critic_model")
        if self.trainer is not None:
            raise ValueError("a trainer's object calls its own network: leave critic_model out, and add_critic to that")
        if critic.bare in (self.teacher.bare, self.student.bare):
            raise ValueError("critic_model is the teacher's or the student's network: pass a copy of its own")
        if not any(parameter.requires_grad for parameter in critic.bare.parameters()):
            raise ValueError("no weight of critic_model trains: critic_model.requires_grad_(True)")
        return critic

    def _check_student(self, student: nn.Module) -> None:
        """Whatever would train wrongly without a word is refused here."""
        bare = self.student.bare
        adapted = self.lycoris is not None or has_adapter(bare)
        if bare is self.teacher.bare and not adapted and _needs_teacher(self.config):
            raise ValueError(
                f"this {type(bare).__name__} has no adapter to switch off, so it cannot be its own teacher: add a LoRA "
                "before making the distiller, or pass a separate student_model"
            )
        if bare is self.teacher.bare:
            check_base(bare)
        if self.lycoris is None and next(lycoris_layers(bare), None) is not None:
            raise ValueError("a LyCORIS network is applied to this model: pass it as lycoris=, or it would not train")
        _check_delta(bare)
        frozen = {name for name, parameter in delta_parameters(bare) if not parameter.requires_grad}
        trained = {name for name, _ in trainable_parameters(bare)}
        parallel = unwrap(student, until="DistributedDataParallel")
        if parallel is not bare:
            built_with = {id(p) for p in getattr(parallel, "_module_parameters", bare.parameters())}
            late = sorted(
                n for n, p in delta_parameters(bare) if n in trained and (n in frozen or id(p) not in built_with)
            )
            if late:
                raise ValueError(
                    f"DDP was built before {late[0]} was trainable and would never reduce its gradient. Patch, add the "
                    "adapter, call anyflow.trainable_parameters(model) or make the distiller, and wrap in DDP last."
                )
        if has_adapter(bare):
            lost = sorted(trained - student_state(bare).keys())
            if lost:
                raise ValueError(
                    f"{lost[0]} and {len(lost) - 1} more weights of the base model would train beside the adapter: the "
                    "teacher would drift with them, and no adapter file holds them. Freeze them: requires_grad_(False)."
                )

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the student: adapters or full weights, and the delta embedders. For the optimizer."""
        if self.lycoris is None:
            return trainable_parameters(self.student.bare)
        network = [(f"lycoris.{name}", parameter) for name, parameter in self.lycoris.named_parameters()]
        return [*network, *self._delta_beside_lycoris()]

    def _delta_beside_lycoris(self) -> list[tuple[str, nn.Parameter]]:
        """A delta embedder trains through LyCORIS where that sits on it, as it does with peft, and itself elsewhere."""
        bare, trained = self.student.bare, []
        for path in delta_paths(self.student.spec):
            delta = bare.get_submodule(path)
            adapted = has_adapter(delta)
            delta.requires_grad_(not adapted)
            if not adapted:
                trained += [(f"{path}.{name}", parameter) for name, parameter in delta.named_parameters()]
        return trained

    def skip_nonfinite_steps(self, optimizer: Any) -> None:
        """From now on ``optimizer.step()`` moves nothing where a loss or a gradient is not finite on any rank.

        ``optimizer``: that of ``trainable_parameters()``, or accelerate's wrapper of it. Call this once, before the
        first step. A step is skipped on all ranks or on none: its gradients are dropped, so that no weight and no
        moment changes, and ``skipped_steps`` counts it. Of accumulated gradients one such micro-batch takes the others
        with it. Costs one all-reduce and one wait for the device in each step; every rank has to make each step. A
        ``GradScaler`` skips overflows by itself, before this is asked, and they are not counted here.
        """
        self._guard.guard(optimizer)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite_steps`` has kept back, in this run and the ones that it continues."""
        return self._guard.skipped

    @property
    def critic(self) -> Critic | None:
        """The fake score of the on-policy stage: its parameters and its optimizer, which the distiller steps itself."""
        return getattr(self._stage, "critic", None)

    def _always_reached(self) -> list[tuple[str, nn.Parameter]]:
        """What has a gradient after every backward: not what LyCORIS drops at random."""
        dropped = random_parameters(self.lycoris)
        return [(name, parameter) for name, parameter in self.trainable_parameters() if id(parameter) not in dropped]

    def prepare_batch(
        self, batch: Mapping[str, Any], model: nn.Module | None = None, state: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The batch with r and the target added; the batch itself is not changed.

        ``batch``: ``latents`` and ``noise`` [B, ...] alike; ``sigmas`` in (0, 1], [B] (or [B, 1, ...]; for families
        with token times also [B, F] or [B, S], where 0 marks clean frames or tokens); optionally ``noisy_latents``
        (else computed), ``r_sigmas`` (else drawn), ``conditioning`` (keyword arguments of a bare model's forward), and
        ``negative_conditioning`` (the complete unconditional ones; for a trainer's object, what replaces the batch's
        own prompt keys), which a guided teacher needs.
        ``model``: the trainer's own wrapper of the network (DDP, compiled), if that is to be the one called; a
        trainer's object calls its own. ``state``: what trainers pass along; not used.

        Adds ``flowmap_r_timesteps`` (pass it as ``r_timestep``) and ``timesteps``, in the model's units, float32;
        ``target``, the average velocity in the model's own sign, float32, and the same object as ``flow_target``;
        ``anyflow_r_timesteps`` (= flowmap_r_timesteps) and ``anyflow_timestep_interval`` (sigma_t - sigma_r).

        With ``target_mode`` "meanflow" the pair (t, r) is drawn here, for all ranks at once: every rank has to call it.
        ``sigmas`` are not needed; where they are times of frames or tokens, those that are 0 stay so. They, the
        ``noisy_latents`` and the ``timesteps`` are replaced. ``negative_conditioning`` is needed for a guidance.

        Raises ValueError that names the missing key or the offending value: NaN sigmas, sigmas outside [0, 1], time 0,
        r >= t, wrong shapes, tensors on several devices.
        """
        self._gradients.report()
        needs = self._stage.needs if self.trainer is not None else (*self._stage.needs, "conditioning")
        missing = [key for key in needs if key not in batch]
        if missing:
            raise ValueError(f"the batch lacks {', '.join(missing)}; it has {', '.join(sorted(batch))}")
        latents, noise = batch["latents"], batch["noise"]
        if noise.shape != latents.shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, latents {list(latents.shape)}")
        layout = TimeLayout(self.student.spec, self.student.bare, latents)
        self.student.bare._flowmap_schedule = None  # type: ignore[assignment]  # an interrupted sampler's
        sigma, r = self._stage.times(batch, layout)
        prepared = {**batch, **self._stage.prepare(batch, layout, sigma, r, model)}
        time = self.student.spec.model_time
        r_time = time(r)
        self.student.bare._flowmap_saw_r = False  # type: ignore[assignment]
        prepared.update(
            timesteps=time(sigma),
            flow_target=prepared["target"],
            flowmap_r_timesteps=r_time,
            anyflow_r_timesteps=r_time,
            anyflow_timestep_interval=sigma - r,
            anyflow_sigmas=sigma,
            anyflow_r_sigmas=r,
        )
        return prepared

    def compute_distill_loss(
        self, prepared_batch: Mapping[str, Any], model_output: Any, original_loss: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L = loss_weight mean (u_theta(x_t, t, r) - u)^2, in float32 whatever the autocast; of "meanflow" the weighted
        and balanced loss of ``anyflow.stages.ForwardStage``, whose mean over the ranks is that of the global batch.

        ``model_output``: the prediction, a dict with ``model_prediction``, or a diffusers output. ``original_loss`` is
        the trainer's own; the loss returned here takes its place.
        Logs, detached 0-d tensors: ``anyflow_loss``, and the means of sigma_t, sigma_r and their difference as
        ``anyflow_timestep``, ``anyflow_r_timestep``, ``anyflow_interval``; of "meanflow" also those of docs/recipes.md;
        after ``skip_nonfinite_steps`` also ``anyflow_skipped_steps``.

        Raises ValueError when the prediction has another shape than the target; RuntimeError when a trainer's model has
        not been given ``flowmap_r_timesteps`` since ``prepare_batch``, so that r would never be learned.
        """
        if self.trainer is not None and not self.student.bare._flowmap_saw_r:
            raise RuntimeError(
                "the model was not given r since prepare_batch: pass batch['flowmap_r_timesteps'] to it as r_timestep"
            )
        target = prepared_batch["target"]
        prediction = velocity_part(self.student.spec, prediction_of(model_output, self.student.spec), target)
        if prediction.shape != target.shape:
            raise ValueError(f"the prediction has shape {list(prediction.shape)}, the target {list(target.shape)}")
        loss, own_logs = self._stage.loss(prepared_batch, prediction)
        self._gradients.watch(loss, self._always_reached)
        self._guard.watch(loss)
        sigma, r = prepared_batch["anyflow_sigmas"], prepared_batch["anyflow_r_sigmas"]
        logs = {
            "anyflow_loss": loss.detach(),
            "anyflow_timestep": sigma.mean(),
            "anyflow_r_timestep": r.mean(),
            "anyflow_interval": (sigma - r).mean(),
            **own_logs,
        }
        if self._guard.active:
            logs["anyflow_skipped_steps"] = loss.detach().new_full((), float(self.skipped_steps))
        return loss, logs

    def training_step(
        self, batch: Mapping[str, Any], model: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Target, student forward and loss; call ``backward`` on the loss. ``model``: as in ``prepare_batch``."""
        prepared = self.prepare_batch(batch, model)
        x = prepared["noisy_latents"].to(model_dtype(self.student.bare))
        output = self._roles.student_through(model)(
            prepared, x, prepared["anyflow_sigmas"], prepared["anyflow_r_sigmas"]
        )
        return self.compute_distill_loss(prepared, output)

    def get_scheduler(self, scheduler: Any = None) -> AnyStepScheduler:
        """A scheduler for validation: give it to the stock pipeline of the student, as its ``scheduler``.

        From ``set_timesteps`` to the last step the student takes r from it; ``r_timestep_for(timestep)`` is the next
        endpoint. ``scheduler``: whose shift to use; by default ``noise_scheduler``. ValueError when neither is given.
        """
        source = scheduler if scheduler is not None else self._roles.scheduler()
        if source is None:
            raise ValueError("get_scheduler needs a scheduler, or a distiller made with noise_scheduler=")
        return AnyStepScheduler.like(source, [self.student.bare])

    def _mode(self) -> dict[str, str]:
        return {"target_mode": self.config.target_mode, "forward_mode": self.config.forward_mode}

    def on_save_checkpoint(self, step: int, directory: str | Path) -> None:
        """Write the student, the position in the random streams, the count of skipped steps and what the stage trains
        besides (the critic and its optimizer) to ``directory``. One rank is enough to call it; with FSDP2 all
        have to."""
        tensors, metadata = self._stage.state()
        tensors = on_disk(tensors)
        counters = {"step": step, "draws": self.streams.draws, "skipped_steps": self.skipped_steps}
        metadata |= {
            "format": "anyflow_distiller",
            **{key: str(count) for key, count in counters.items()},
            **self._mode(),
        }
        save_student(self.student.bare, directory, lycoris=self.lycoris)
        write_tensors({Path(directory) / STATE_FILE: (tensors, metadata)})

    def on_load_checkpoint(self, directory: str | Path) -> int:
        """Restore what ``on_save_checkpoint`` wrote, on every rank; returns its step.

        Raises ValueError, and changes nothing, for the state of another target mode, or of another critic. To go on
        from its student in another stage, give that to ``anyflow.load_student``.
        """
        path = Path(directory) / STATE_FILE
        tensors, metadata = read(path)
        if metadata.get("format") != "anyflow_distiller":
            raise ValueError(f"{path} is not the state of a distiller: {metadata}")
        for key, own in self._mode().items():
            if metadata.get(key, own) != own:
                raise ValueError(
                    f"{path} is of {key}={metadata[key]!r}, this distiller has {own!r}. To go on from its student in "
                    "another stage: anyflow.load_student(model, directory)"
                )
        load_state = self._stage.plan_load(tensors, metadata)
        load_student(self.student.bare, directory, lycoris=self.lycoris)
        scale: float = self.student.bare._flowmap.spec.time_scale  # type: ignore[union-attr, assignment]
        if scale != self.student.spec.time_scale:
            raise ValueError(f"the student was trained with timestep_scale={scale}, not {self.student.spec.time_scale}")
        self.streams.draws = int(metadata["draws"])
        self._guard.skipped = int(metadata.get("skipped_steps", 0))
        load_state()
        return int(metadata["step"])


def _needs_teacher(config: AnyFlowConfig) -> bool:
    if config.target_mode == "meanflow":
        return config.diffusion_target == "base_prediction"
    return config.target_mode in ("online_teacher", "onpolicy")


def _refuse_other_than_flow(trainer: Any, noise_scheduler: Any) -> None:
    prediction = getattr(trainer, "PREDICTION_TYPE", None)
    prediction = getattr(prediction, "value", prediction)
    if prediction is not None and prediction != "flow_matching":
        raise ValueError(f"PREDICTION_TYPE {prediction!r}: AnyFlow needs a flow_matching model")
    scheduled = getattr(getattr(noise_scheduler, "config", None), "prediction_type", None)
    if scheduled in NOT_FLOW:
        raise ValueError(
            f"prediction_type {scheduled!r} of {type(noise_scheduler).__name__}: AnyFlow needs a flow model"
        )
    if getattr(getattr(trainer, "config", None), "train_text_encoder", False):
        raise ValueError("train_text_encoder: AnyFlow distils the denoiser only; turn text-encoder training off")


def _lycoris_network(trainer: Any) -> Any:
    if getattr(getattr(trainer, "config", None), "lora_type", "standard") != "lycoris":
        return None
    network = getattr(getattr(trainer, "accelerator", None), "_lycoris_wrapped_network", None)
    if network is None:
        raise ValueError("config.lora_type is 'lycoris', but accelerator._lycoris_wrapped_network is missing")
    return network


def _check_delta(bare: nn.Module) -> None:
    """A delta embedder that no optimizer can train."""
    parameters = list(delta_parameters(bare))
    if not parameters:
        raise ValueError(
            "the delta embedder has no parameters of its own: FSDP has made one flat, frozen parameter of it and its "
            "neighbours. Wrap with use_orig_params=True, or give the delta embedder a unit of its own."
        )
    for path in delta_paths(spec_of(bare)):
        delta = bare.get_submodule(path)
        quantised = [name for name, parameter in delta.named_parameters() if is_quantised(parameter)]
        if quantised and not has_adapter(delta):
            raise ValueError(
                f"{path}.{quantised[0]} is quantised and cannot be trained: leave the delta embedder out of "
                "quantisation, or put a LoRA on it"
            )
