"""What a trainer talks to: configuration -> objective -> batch and loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .adapters import has_adapter, teacher_mode
from .checkpoints import load_student, read, save_student, write_atomically
from .config import AnyFlowConfig
from .denoiser import Denoiser, DiffusersDenoiser, TimeLayout, TrainerDenoiser
from .objectives import average_velocity, linear_velocity
from .patching import is_patched, patch, trainable_parameters
from .sampling import AnyStepScheduler
from .time import at_least_float32, sample_r

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
    ) -> None:
        given = {} if config is None else config.to_dict() if isinstance(config, AnyFlowConfig) else dict(config)
        self.config = AnyFlowConfig.from_dict(given)
        self.noise_scheduler = noise_scheduler
        self.trainer = teacher_model if hasattr(teacher_model, "model_predict") else None
        _refuse_other_than_flow(self.trainer, noise_scheduler)
        scale = self.config.timestep_scale
        self.teacher: Denoiser = (
            DiffusersDenoiser(teacher_model, time_scale=scale)
            if self.trainer is None
            else TrainerDenoiser(self.trainer, time_scale=scale)
        )
        self.lycoris = _lycoris_network(self.trainer)
        if student_model is not None:
            self.student: Denoiser = DiffusersDenoiser(student_model, time_scale=scale)
        else:
            self.student = self.teacher
        self._patch_student(given)
        # Full-rank students would be their own teacher.
        shared = self.student.bare is self.teacher.bare
        needs_teacher = self.config.target_mode == "online_teacher"
        if shared and needs_teacher and self.lycoris is None and not has_adapter(self.student.bare):
            raise ValueError(
                f"this {type(self.student.bare).__name__} has no adapter to switch off, so it cannot be its own "
                "teacher: add a LoRA before making the distiller, or pass a separate student_model"
            )
        self.trainable_parameters()
        if needs_teacher and self.config.teacher_rollout_steps == 1:
            warnings.warn(
                "teacher_rollout_steps=1: one Euler step makes the target the teacher's own velocity, whatever r is; "
                "use 4 or more",
                stacklevel=2,
            )
        self._generator: torch.Generator | None = None

    def _patch_student(self, given: Mapping[str, Any]) -> None:
        bare: Any = self.student.bare
        conditioning = {key: getattr(self.config, key) for key in ("gate_value", "deltatime_type")}
        if is_patched(bare):
            settings = bare._flowmap
            current = {"gate_value": settings.gate_value, "deltatime_type": settings.deltatime_type}
            conditioning = {key: conditioning[key] if key in given else value for key, value in current.items()}
            self.config = AnyFlowConfig.from_dict({**self.config.to_dict(), **conditioning})
        patch(bare, **conditioning)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the student: adapters or full weights, and the delta embedders. For the optimizer."""
        return trainable_parameters(self.student.bare)

    def prepare_batch(
        self, batch: Mapping[str, Any], model: nn.Module | None = None, state: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The batch with r and the target added; the batch itself is not changed.

        ``batch``: ``latents`` and ``noise`` [B, ...] alike; ``sigmas`` in (0, 1], [B] (or [B, 1, ...]; for families
        with token times also [B, F] or [B, S], where 0 marks clean frames or tokens); optionally ``noisy_latents``
        (else computed), ``r_sigmas`` (else drawn), ``conditioning`` (keyword arguments of a bare model's forward), and
        ``negative_conditioning`` (the complete unconditional ones; for a trainer's object, what replaces the batch's
        own prompt keys), which a guided teacher needs.
        ``model``: the trainer's own wrapper of the network, if it is to be the one that is called.

        Adds ``flowmap_r_timesteps`` (pass it as ``r_timestep``) and ``timesteps``, in the model's units, float32;
        ``target``, the average velocity in the model's own sign, float32, and the same object as ``flow_target``;
        ``anyflow_r_timesteps`` (= flowmap_r_timesteps) and ``anyflow_timestep_interval`` (sigma_t - sigma_r).

        Raises ValueError that names the missing key or the offending value: NaN sigmas, sigmas outside [0, 1], time 0,
        r >= t, wrong shapes, tensors on several devices.
        """
        missing = [key for key in ("latents", "noise", "sigmas") if key not in batch]
        if self.trainer is None and "conditioning" not in batch:
            missing.append("conditioning")
        if missing:
            raise ValueError(f"the batch lacks {', '.join(missing)}; it has {', '.join(sorted(batch))}")
        latents, noise = batch["latents"], batch["noise"]
        if noise.shape != latents.shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, latents {list(latents.shape)}")
        layout = TimeLayout(self.student.spec, self.student.bare, latents)
        sigma = layout.for_model(at_least_float32(batch["sigmas"]))
        generator = self._generator_on(sigma.device)
        if batch.get("r_sigmas") is None:
            r = sample_r(sigma, self.config.r_timestep_sampler, self.config.min_interval_ratio, generator)
        else:
            r = layout.for_model(at_least_float32(batch["r_sigmas"]))
        _check_devices({"latents": latents, "noise": noise, "sigmas": sigma, "r_sigmas": r})
        _check_times(sigma, r)

        prepared = dict(batch)
        if prepared.get("noisy_latents") is None:
            s = layout.for_latents(sigma)
            prepared["noisy_latents"] = ((1 - s) * latents + s * noise).to(latents.dtype)
        target = self._target(prepared, layout, sigma, r, model)
        time = self.student.time  # type: ignore[attr-defined]
        r_time = time(r)
        prepared.update(
            timesteps=time(sigma),
            target=target,
            flow_target=target,
            flowmap_r_timesteps=r_time,
            anyflow_r_timesteps=r_time,
            anyflow_timestep_interval=sigma - r,
            anyflow_sigmas=sigma,
            anyflow_r_sigmas=r,
        )
        return prepared

    def _target(
        self, batch: dict[str, Any], layout: TimeLayout, sigma: Tensor, r: Tensor, model: nn.Module | None
    ) -> Tensor:
        if self.config.target_mode == "linear":
            given = getattr(self.trainer, "get_flow_matching_target", None)
            if given is not None:
                return at_least_float32(given(batch))
            return self._to_prediction(linear_velocity(batch["latents"], batch["noise"]))
        guidance = self.config.teacher_guidance_scale
        if guidance != 1.0 and batch.get("negative_conditioning") is None:
            raise ValueError(f"teacher_guidance_scale={guidance} needs negative_conditioning in the batch")
        teacher = self.teacher
        if model is not None and isinstance(teacher, DiffusersDenoiser) and self.student is teacher:
            teacher = DiffusersDenoiser(model, teacher.spec, self.config.timestep_scale)
        to_flow = getattr(self.trainer, "prediction_to_noiseward_flow", None)

        def velocity(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
            predictions = [teacher(batch, x, s, None)]
            if guidance != 1.0:
                predictions.append(teacher(batch, x, s, None, negative=True))
            if to_flow is not None:
                predictions = [to_flow(prediction) for prediction in predictions]
            return predictions[0], predictions[1] if len(predictions) > 1 else None

        with teacher_mode(*{self.teacher.bare, self.student.bare}, lycoris=self.lycoris):
            average = average_velocity(
                velocity,
                batch["noisy_latents"],
                sigma,
                r,
                self.config.teacher_rollout_steps,
                guidance_scale=guidance,
                sign=1 if to_flow is not None else teacher.spec.prediction_sign,
                model_dtype=_model_dtype(self.teacher.bare),
                to_latents=layout.for_latents,
            )
        return self._to_prediction(average)

    def _to_prediction(self, flow: Tensor) -> Tensor:
        """From noiseward to what the student predicts."""
        convert = getattr(self.trainer, "noiseward_flow_to_prediction", None)
        if convert is not None:
            return convert(flow)
        return flow if self.student.spec.prediction_sign == 1 else -flow

    def compute_distill_loss(
        self, prepared_batch: Mapping[str, Any], model_output: Any, original_loss: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L = loss_weight mean (u_theta(x_t, t, r) - u)^2, in float32 whatever the autocast.

        ``model_output``: the prediction, a dict with ``model_prediction``, or a diffusers output. ``original_loss`` is
        the trainer's own; the loss returned here takes its place.
        Logs, detached 0-d tensors: ``anyflow_loss``, and the means of sigma_t, sigma_r and their difference as
        ``anyflow_timestep``, ``anyflow_r_timestep``, ``anyflow_interval``.

        Raises ValueError when the prediction has another shape than the target.
        """
        prediction = _prediction(model_output)
        target = prepared_batch["target"]
        if prediction.shape != target.shape:
            raise ValueError(f"the prediction has shape {list(prediction.shape)}, the target {list(target.shape)}")
        loss = self.config.loss_weight * (at_least_float32(prediction) - target).square().mean()
        sigma, r = prepared_batch["anyflow_sigmas"], prepared_batch["anyflow_r_sigmas"]
        logs = {
            "anyflow_loss": loss.detach(),
            "anyflow_timestep": sigma.mean(),
            "anyflow_r_timestep": r.mean(),
            "anyflow_interval": (sigma - r).mean(),
        }
        return loss, logs

    def training_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Target, student forward and loss; call ``backward`` on the loss."""
        prepared = self.prepare_batch(batch)
        x = prepared["noisy_latents"].to(_model_dtype(self.student.bare))
        output = self.student(prepared, x, prepared["anyflow_sigmas"], prepared["anyflow_r_sigmas"])
        return self.compute_distill_loss(prepared, output)

    def get_scheduler(self, scheduler: Any = None) -> AnyStepScheduler:
        """A scheduler for validation: give it to the stock pipeline of the student, as its ``scheduler``.

        From ``set_timesteps`` to the last step the student takes r from it; ``r_timestep_for(timestep)`` is the next
        endpoint. ``scheduler``: whose shift to use; by default ``noise_scheduler``. ValueError when neither is given.
        """
        source = scheduler if scheduler is not None else self.noise_scheduler
        if source is None:
            source = getattr(getattr(self.trainer, "pipeline", None), "scheduler", None)
        if source is None:
            raise ValueError("get_scheduler needs a scheduler, or a distiller made with noise_scheduler=")
        return AnyStepScheduler.like(source, [self.student.bare])

    def on_save_checkpoint(self, step: int, directory: str | Path) -> None:
        """Write the student and the state of the random stream to ``directory``."""
        save_student(self.student.bare, directory)
        state = self._generator_on(torch.device("cpu")).get_state()
        metadata = {"format": "anyflow_distiller", "step": str(step)}
        write_atomically(Path(directory) / STATE_FILE, save({"generator": state}, metadata))

    def on_load_checkpoint(self, directory: str | Path) -> int:
        """Restore what ``on_save_checkpoint`` wrote; returns its step."""
        tensors, metadata = read(Path(directory) / STATE_FILE)
        if metadata.get("format") != "anyflow_distiller":
            raise ValueError(f"{Path(directory) / STATE_FILE} is not the state of a distiller: {metadata}")
        load_student(self.student.bare, directory)
        self._generator_on(torch.device("cpu")).set_state(tensors["generator"])
        return int(metadata["step"])

    def _generator_on(self, device: torch.device) -> torch.Generator:
        """The private stream of r, one for each rank: on the CPU, so that a run does not depend on the device."""
        if self._generator is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            self._generator = torch.Generator().manual_seed(self.config.seed + 1_000_003 * rank)
        return self._generator


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


def _model_dtype(bare: Any) -> torch.dtype:
    """The dtype in which the model takes latents."""
    dtype = getattr(bare, "dtype", torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def _prediction(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "model_prediction" in output:
        return output["model_prediction"]
    if hasattr(output, "sample"):
        return output.sample
    return output[0] if isinstance(output, tuple) else output


def _check_devices(tensors: Mapping[str, Tensor]) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"the batch is on several devices: {devices}")


def _check_times(sigma: Tensor, r: Tensor) -> None:
    """One read of the device for all that can be wrong. Clean tokens (t = r = 0) are allowed beside noisy ones."""
    tokens = sigma.ndim > 1
    zero = (sigma == 0).flatten(1).all(1) if tokens else sigma == 0
    not_below = (r >= sigma) & ~((sigma == 0) & (r == 0)) if tokens else r >= sigma
    found = torch.stack(
        [
            (~torch.isfinite(sigma)).any(),
            ((sigma < 0) | (sigma > 1)).any(),
            zero.any(),
            (~(r >= 0)).any(),
            not_below.any(),
        ]
    ).tolist()
    if not any(found):
        return
    not_finite, outside, at_zero, bad_r, order = found
    values = f"sigmas {sigma.flatten().tolist()[:8]}, r {r.flatten().tolist()[:8]}"
    if not_finite:
        raise ValueError(f"sigmas must be finite, got {values}")
    if outside:
        raise ValueError(f"sigmas must be in [0, 1], got {values}")
    if at_zero:
        raise ValueError(f"time 0 has no interval below it, got {values}")
    if bad_r:
        raise ValueError(f"r must be in [0, t), got {values}")
    if order:
        raise ValueError(f"r must be below t, got {values}")
