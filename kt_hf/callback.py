"""`KTMoECallback`: what a stock Trainer has to be told about experts on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapters import publish, seal, start_from, tell_interrupted, verify_adapter
from .adapters.adapter import ADAPTER
from .backends import CALL_LOCK
from .backends.buffer_pool import BUFFER_POOL
from .errors import KTAMXConfigError
from .experts.layer import KTExperts, kt_layers, update_lora
from .monitoring.accumulation import accumulation_advice
from .monitoring.expert_load import LoadLog
from .monitoring.late_start import late_start
from .monitoring.memory_log import memory_and_placement
from .monitoring.tier_times import TierTimes
from .peft_compat.saving import adapter_bytes, check_trained
from .placement import packer_of
from .placement.assembly import settle_step
from .placement.record import begin_run, write_run_placement
from .shapes import PROJECTIONS
from .system.disk import check_space
from .system.parallel import refuse_parallel_trainer

logger = logging.getLogger(__name__)


class KTMoECallback(TrainerCallback):
    """Add it to the callbacks of a Trainer, SFTTrainer or DPOTrainer whose model `apply_kt_moe` has patched.

    Refuses a run that cannot work before its first step, refreshes the operators' copies of the LoRA tensors after each
    optimizer step, and checks that every checkpoint holds every expert tensor. Adds tokens per second, the load of the
    experts (`LoadLog.collect` says what they mean), memory and placement to what the trainer logs and to
    `trainer.state.log_history`; `lead(trainer)` has reporters such as TensorBoard see them.

    Args:
        adapter: Folder or safetensors file of an adapter, of any format that `kt_hf.adapters` reads, whose values the
            trainer's adapter gets before the first step (not on resuming). Ranks and targets must agree.

    Attributes:
        expert_load: `LoadLog` of the run; `expert_load.total` has every layer's counts.

    Raises:
        KTAMXConfigError: From the Trainer's calls: a model that is not patched, or was for another number of processes
            than train it; DataParallel; nothing to train that would be saved.
        KTAMXError: From the Trainer's calls: a checkpoint that lacks expert tensors; an adapter to start from that does
            not fit.
    """

    def __init__(self, adapter: str | Path | None = None) -> None:
        if adapter is not None and not isinstance(adapter, (str, Path)):
            raise KTAMXConfigError(f"adapter={adapter!r} is no path: give an adapter's folder or safetensors file.")
        self.adapter = adapter
        self.advises = True  # on gradient accumulation, once
        self._warned_untrained = self._warned_late = False
        self._threads: int | None = None
        self.expert_load = LoadLog()
        self._times: TierTimes | None = None

    def lead(self, trainer: Any) -> None:
        """Put this callback before the trainer's reporters (TensorBoard, W&B, MLflow, SwanLab …).

        A Trainer calls reporters before the callbacks it is given, so that they would not see what this one adds to the
        logs. Call it once the trainer is made; without it the values are in `trainer.state.log_history` alone.

        Args:
            trainer: A transformers Trainer that has this callback, or gets it now.
        """
        before = list(trainer.callback_handler.callbacks)
        if self not in before:
            trainer.add_callback(self)
        for other in before:
            if other is self:
                break
            if not isinstance(other, DefaultFlowCallback):  # which decides whether a step is logged and saved
                trainer.remove_callback(other)
                trainer.add_callback(other)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run, load the adapter to start from, and hand LoRA to the operators.

        Raises:
            KTAMXConfigError: The run cannot work, or would save nothing.
            KTAMXError: The adapter to start from does not fit.
        """
        model = kwargs["model"]
        layers = _layers(model)
        refuse_parallel_trainer(model, args.n_gpu, args)
        _check_world(layers, args.world_size)
        _refuse_another_forward(layers)
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not any("lora_" in name or "modules_to_save" in name or "trainable_tokens" in name for name in trainable):
            raise KTAMXConfigError(
                "Nothing of this run would be saved: no LoRA adapter is trained, and the experts of a patched model "
                "are not in its checkpoint. Give the trainer a peft_config (kt_lora_config(model)), or "
                "call get_peft_model."
            )
        if getattr(args, "precompute_ref_log_probs", True) is False and layers[0].backend_name != "torch":
            logger.info(
                "kt_hf: the reference's forward of each step makes the experts compute the policy's once more; "
                "precompute_ref_log_probs=True spares both."
            )
        if not self._warned_untrained and not any(_trained(layer) for layer in layers):
            self._warned_untrained = True
            logger.warning(
                "The experts are not trained: no LoRA on them. target_modules (or lora_target) %s would reach them.",
                ", ".join(PROJECTIONS),
            )
        check_trained(model)
        if self.adapter is not None and state.global_step == 0:
            start_from(model, self.adapter)
        update_lora(layers)
        self.expert_load.begin(layers)
        if self.advises and (advice := accumulation_advice(model, args)):
            self.advises = False
            logger.info("kt_hf: %s", advice)
        late = None if self._warned_late else late_start(layers, kwargs.get("optimizer"))
        if late and state.is_world_process_zero:
            self._warned_late = True
            logger.warning("kt_hf: %s", late)
        packer = packer_of(model)
        self._times = TierTimes(packer) if packer else None
        if packer and packer.promotion:
            elsewhere = args.use_cpu and packer.gpu_device.type != "cpu"  # the GPU is not this trainer's
            begin_run(packer, _computed_as(args, model), fixed=args.full_determinism or elsewhere)
        most, before = layers[0].backend.torch_threads, torch.get_num_threads()
        if most is not None and most < before and next(model.parameters()).device.type == "cpu":
            # The rest of the model is on the CPU too: PyTorch leaves a core to the operators' idle workers.
            self._threads = before
            torch.set_num_threads(most)
            logger.info("kt_hf: PyTorch computes on %d of %d threads, beside the operators' own.", most, before)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to time the tiers of a planned placement."""
        if self._times:
            self._times.step_begin(kt_layers(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refresh the operators' copies of the LoRA tensors.

        Raises:
            KTAMXError: The disk has no room for the checkpoint that is due.
        """
        layers = kt_layers(kwargs["model"])
        self.expert_load.stepped()
        update_lora(layers)
        if self._times:
            self._times.step_end(layers, args.gradient_accumulation_steps)
        if control.should_save:
            _check_space(args, kwargs["model"], kwargs.get("optimizer"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the disk before the checkpoint of an epoch.

        Raises:
            KTAMXError: It has no room for the checkpoint.
        """
        if control.should_save:
            _check_space(args, kwargs["model"], kwargs.get("optimizer"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the experts' load to the logs of a training step."""
        logs = kwargs.get("logs")
        if not logs or "loss" not in logs:  # the logs of evaluation, and the summary at the end
            return
        load = self.expert_load.collect(kt_layers(kwargs["model"])) | memory_and_placement(kwargs["model"])
        logs.update(load)
        if state.log_history and state.is_world_process_zero:
            state.log_history[-1].update(load)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refresh the operators' copies, and give back buffers, layers on the GPU and PyTorch's threads."""
        layers = kt_layers(kwargs["model"])
        if (packer := packer_of(kwargs["model"])) and packer.promotion:
            packer.promotion.release()
        update_lora(layers)
        with CALL_LOCK:
            BUFFER_POOL.release()
        self._times = None
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise what a GPU has found not finite in the evaluation (KTAMXForwardError)."""
        _settle(kwargs["model"])
        self.expert_load.set_aside()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Raise what a GPU has found not finite in the prediction (KTAMXForwardError)."""
        _settle(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Verify every adapter of a checkpoint once more, and mark the checkpoint as whole.

        Raises:
            KTAMXError: An adapter's files have changed since the trainer saved them.
        """
        self.expert_load.set_aside()
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero:
            return
        # What another callback or a Trainer's own save did to the files since they were verified. PEFT saves the
        # adapter "default" in the folder, others in a folder of their name.
        for file in [folder / ADAPTER, *folder.glob(f"*/{ADAPTER}")]:
            if file.exists():
                verify_adapter(file.parent)
        packer = packer_of(kwargs["model"])
        if packer and packer.tiers and packer.tiers.need_gpu:
            write_run_placement(folder, packer, _computed_as(args, kwargs["model"]))
        seal(folder)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say what an interrupted run has left in the output folder, and settle what depends on the steps."""
        if kwargs.get("model") is not None and kwargs.get("optimizer") is None and not args.use_cpu:
            settle_step(kwargs["model"], **step_of(args))
        if args.output_dir:
            tell_interrupted(args.output_dir)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the checkpoint's manifest and card beside the adapter that is pushed to the hub."""
        if args.output_dir and state.is_world_process_zero:
            publish(Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir))


# Configurations of TRL's trainers: whose loss takes no full logits, whose batches are of pairs.
_TILED = ("DPOConfig", "KTOConfig", "GRPOConfig", "RewardConfig")
_PAIRS = ("DPOConfig", "ORPOConfig", "RewardConfig")


def step_of(args: TrainingArguments) -> dict[str, Any]:
    """How a trainer with these arguments computes its steps: keyword arguments of `settle_step`.

    TRL's trainers compute the loss by tiles of logits (SFTTrainer's `nll`, DPO, KTO and GRPO, since TRL 1.16; a reward
    model has none), and batches of pairs are of chosen and rejected answers.
    """
    kind = type(args).__name__
    tiled, sft = kind in _TILED, getattr(args, "loss_type", None) == "nll"
    length = getattr(args, "max_length", None)
    tokens = args.per_device_train_batch_size * length * (2 if kind in _PAIRS else 1) if length else None
    return {
        "tokens": tokens,
        "loss": "chunked" if tiled or (sft and not args.label_smoothing_factor) else "full",
        "checkpointing": args.gradient_checkpointing,
        "offloading": bool(getattr(args, "activation_offloading", False)),
        "accumulating": args.gradient_accumulation_steps > 1,
    }


def _computed_as(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """What decides how much memory a step takes, in plain values, for a checkpoint's record."""
    config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
    attention = str(getattr(config, "_attn_implementation", ""))
    several = {"processes": args.world_size} if args.world_size > 1 else {}
    return {**step_of(args), "attention": attention, "liger": bool(args.use_liger_kernel), **several}


def checkpoint_bytes(args: TrainingArguments, model: Any, optimizer: Any) -> int:
    """About what a checkpoint takes on the disk: the adapters and the optimizer's state."""
    states = {} if args.save_only_model else getattr(optimizer, "state", {})
    values = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
    adapters = sum(adapter_bytes(model, name) for name in getattr(model, "peft_config", None) or {})
    return adapters + sum(value.numel() * value.element_size() for value in values)


def _check_space(args: TrainingArguments, model: Any, optimizer: Any) -> None:
    """Refuse to begin a checkpoint that the disk has no room for (KTAMXDiskFullError), which would be left in part."""
    check_space(
        Path(args.output_dir or "."),
        checkpoint_bytes(args, model, optimizer),
        "Free some and resume: the checkpoints that are there are whole",
    )


def _settle(model: nn.Module) -> None:
    """Look at all checks of results that a GPU has under way (KTAMXForwardError, KTAMXBackwardError)."""
    for checks in {id(layer.factory.checks): layer.factory.checks for layer in kt_layers(model)}.values():
        with CALL_LOCK:
            checks.settle(wait=True)


def _layers(model: nn.Module) -> list[KTExperts]:
    layers = kt_layers(model)
    if not layers:
        raise KTAMXConfigError("KTMoECallback: the trainer's model is not patched. Call apply_kt_moe(model) before.")
    return layers


def _check_world(layers: list[KTExperts], processes: int) -> None:
    """Refuse a model that was patched for another number of processes than train it."""
    exchange = layers[0].exchange
    patched = 1 if exchange is None else exchange.ranks.size
    if patched != processes:
        launched = (
            "start the script with torchrun or accelerate launch, which tell each process before the model is patched"
        )
        # accelerate 1.15 counts one process where it sees no GPU, unless the CPU is asked for.
        on_cpu = "without a GPU the trainer's arguments need use_cpu=True to count the processes of torchrun"
        raise KTAMXConfigError(
            f"The model was patched in a run of {patched} processes, and the trainer counts {processes} (WORLD_SIZE): "
            f"{on_cpu if processes == 1 and not torch.cuda.is_available() else launched}."
        )


def _refuse_another_forward(layers: list[KTExperts]) -> None:
    """Kernel libraries bind a forward of stock experts to the instance (accelerate's hooks call ours, and are kept)."""
    for layer in layers:
        bound = vars(layer).get("forward")
        if bound is not None and not hasattr(layer, "_hf_hook"):
            name = getattr(bound, "__qualname__", type(bound).__name__)
            raise KTAMXConfigError(
                f"The forward of {layer.label} has been replaced by {getattr(bound, '__module__', '')}.{name}, which "
                "cannot compute patched experts. Leave that library's experts out (of Liger: swiglu=False), or apply "
                "it before apply_kt_moe."
            )


def _trained(layer: KTExperts) -> bool:
    return any(parameter.requires_grad for parameter in layer.lora_params.values())
