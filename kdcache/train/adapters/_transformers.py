"""transformers' Trainer, trained from a cache.

Trainer finds where it was after a resume by counting steps and skipping batches; it believes that all epochs have as many.
It gets a DataLoader over batch indices: what it skips are numbers, nothing is read; and rounds of constant length, see
stream.py. The loader's own state lies in the checkpoint's `trainer_state.json`, written by Trainer in one piece with the step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, StateError
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.caches import CacheLike
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.adapters.attached import projector_group, without
from kdcache.train.adapters.stream import BatchStream, num_stream_batches
from kdcache.train.adapters.student_loss import StudentLoss
from kdcache.train.finite import check_weights
from kdcache.train.terms.engine import LossTerms, scale_of, summed_over_ranks

_Base = Trainer if TYPE_CHECKING else object

_STATE, _TERMS = "kdcache_loader", "kdcache_terms.safetensors"
_FIELDS = [field.name for field in fields(TorchBatch)]
# Trainer counts tokens and operations by this name.
_NAMES = {"input_ids_BT": "input_ids", "position_ids_BT": "position_ids"}


class KDMixin(_Base):
    """For transformers' Trainer and its subclasses: training batches come from a cache, the loss is the fused sparse one.

    `args.max_steps` steps, or as many as `args.num_train_epochs` passes over the cache take; `gradient_accumulation_steps`
    batches in each. `per_device_train_batch_size`, `dataloader_*`, `ignore_data_skip` and `average_tokens_across_devices` have
    no say: the loader's options do, and a step's loss is the mean over the positions of all its batches on all ranks.
    Evaluation is the trainer's own.

    Args:
        model: a causal language model.
        args: the trainer's; not changed.
        cache: address, open cache, or several, as for a Loader.
        loader: what a batch holds. `batch_rows` is that of one batch of ALL ranks, before accumulation.
        loss: what is minimised.
        others: as the trainer takes them, but for the training data.

    Raises:
        ConfigError: see StudentLoss; several GPUs in one process; ranks that cannot share a batch.
        StateError (from `train`): a checkpoint of another cache, of other options, or not made by this.
        NotFiniteError (from `train`): a loss is NaN or infinite, see StudentLoss; or a weight is, where one would be saved.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        cache: CacheLike | Sequence[CacheLike],
        loader: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
        loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
        **others: Any,
    ) -> None:
        _check_arguments(args, others)
        batches = Loader(cache, loader, rank=args.process_index, world_size=args.world_size)
        args, round_steps = _arguments(args, batches)
        self._round_steps, self._is_set, self._is_checkpoint = round_steps, False, False
        self._seen: Tensor | float = 0.0
        self.stream = BatchStream(
            batches,
            round_batches=round_steps * args.gradient_accumulation_steps,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )
        try:
            super().__init__(model=model, args=args, **others)  # by name: some begin with arguments of their own
            self.student_loss = StudentLoss(self.model, batches, loss, seed=args.seed)  # pyright: ignore[reportArgumentType]
        except BaseException:
            batches.close()
            raise
        # compute_loss divides by the positions of the whole accumulated batch: nobody is to divide again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def train(self, *args: Any, **options: Any) -> Any:
        """As the trainer's; `resume_from_checkpoint` continues after the last batch, reading none again."""
        try:
            return super().train(*args, **options)
        finally:
            self.stream.pause()

    def close(self) -> None:
        """Close the loader, and the caches that were given as addresses."""
        self.stream.pause()
        self.stream.loader.close()

    def get_train_dataloader(self) -> DataLoader:
        self._is_set = False
        indices = _Indices(self._round_start, len(self.stream))
        return DataLoader(self.stream, batch_sampler=indices, collate_fn=_inputs)  # pyright: ignore[reportArgumentType]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "flat_positions_P" not in inputs:  # evaluation, on data of the trainer's own
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scale = None
        if num_items_in_batch is not None:
            scale = scale_of(torch.as_tensor(num_items_in_batch), self.args.world_size)
        self.student_loss.at = (self.state.global_step, self.state.max_steps)
        # What the trainer does not know how to move: features.
        loss = self.student_loss(model, _batch(inputs).to(self.args.device), scale)
        self._seen = self._seen + self.student_loss.seen()
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """What terms count in one optimiser step, on all ranks."""
        if not batch_samples or "flat_positions_P" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        return self.student_loss.counts(_batch(inputs).to(device) for inputs in batch_samples).float()

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """As the trainer's; what terms of the loss learn has a learning rate of its own and no weight decay."""
        terms: LossTerms = self.student_loss.loss.terms
        model: Any = self.model
        with without(model):
            optimizer: Any = super().create_optimizer(*args, **options)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if terms.has_parameters and not any(id(p) in known for p in terms.parameters()):
            optimizer.add_param_group(projector_group(terms))
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As the trainer's, with each term's mean over all ranks since the last time, where there are several."""
        if "loss" in logs and isinstance(self._seen, Tensor):
            sums, counts = summed_over_ranks(self._seen)
            names, self._seen = self.student_loss.loss.terms.names, 0.0
            means = zip(names, (sums / counts).tolist(), strict=True)
            logs |= {f"terms/{name}": mean for name, mean in means if len(names) > 1 and not math.isnan(mean)}
        super().log(logs, *args, **options)

    def save_model(self, output_dir: str | None = None, *args: Any, **options: Any) -> None:
        """As the trainer's, of a model whose weights are finite, and without what terms of the loss learn."""
        check_weights(self.model, f"step {self.state.global_step}:")  # pyright: ignore[reportArgumentType]
        super().save_model(output_dir, *args, **options)
        terms = self.student_loss.loss.terms
        if self._is_checkpoint and terms.has_parameters and self.args.should_save:
            # In place before the trainer writes its state, without which a checkpoint is none.
            save_file(_on_cpu(terms.state_dict()), str(Path(output_dir or self.args.output_dir or ".") / _TERMS))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # As the state of a callback: Trainer keeps it with the step's number, and passes over names that it does not know.
        self._callback_states()[_STATE] = {"args": {}, "attributes": self.stream.state_dict()}
        self._is_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_checkpoint = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with without(self.model):  # pyright: ignore[reportArgumentType] - or the trainer would warn that they are missing
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        terms, path = self.student_loss.loss.terms, Path(resume_from_checkpoint) / _TERMS
        if not terms.has_parameters:
            return
        if not path.is_file():
            raise StateError(f"{path} is missing: the checkpoint was made with another loss, whose terms learned nothing")
        terms.load_state_dict(load_file(path))

    def _round_start(self) -> int:
        """The index of the first batch of the round in which the trainer stands."""
        if not self._is_set and self.state.global_step > 0:
            self._resume()
        self._is_set = True
        return self.state.global_step // self._round_steps * len(self.stream)

    def _resume(self) -> None:
        saved = self._callback_states().get(_STATE)
        if saved is None:
            raise StateError(
                f"the checkpoint of step {self.state.global_step} holds no state of a kdcache loader: it was made by another "
                "trainer, so that what it has read is not known; start a new run with its model instead of resuming"
            )
        self.stream.load_state_dict(saved["attributes"])
        expected = self.state.global_step * self.args.gradient_accumulation_steps
        if self.stream.next_index != expected:
            raise StateError(
                f"the checkpoint of step {self.state.global_step} was made after batch {self.stream.next_index}, which is not "
                f"{self.args.gradient_accumulation_steps} in each step: use the gradient_accumulation_steps it was made with"
            )

    def _callback_states(self) -> dict[str, Any]:
        states: Any = self.state.stateful_callbacks  # annotated as the list that it is given as
        return states


class KDTrainer(KDMixin, Trainer):
    """transformers' Trainer with the batches of a cache and the fused loss, see KDMixin."""


class _Indices:
    """A batch sampler: indices of the batches of one round."""

    def __init__(self, first: Callable[[], int], num_batches: int) -> None:
        self._first, self._num_batches = first, num_batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self._first()
        return ([index] for index in range(first, first + self._num_batches))

    def __len__(self) -> int:
        return self._num_batches


def _inputs(batches: list[TorchBatch]) -> dict[str, Any]:
    """A batch as dicts, which Trainer moves to its device."""
    inputs = {_NAMES.get(name, name): getattr(batches[0], name) for name in _FIELDS}
    teacher = batches[0].teacher
    return inputs | {"teacher": {field.name: getattr(teacher, field.name) for field in fields(teacher)}}


def _batch(inputs: Mapping[str, Any]) -> TorchBatch:
    values: dict[str, Any] = {name: inputs[_NAMES.get(name, name)] for name in _FIELDS}
    values["teacher"] = SoftTargets(**values["teacher"])
    return TorchBatch(**values)


def _check_arguments(args: TrainingArguments, others: dict[str, Any]) -> None:
    for name in ("train_dataset", "data_collator", "model_init", "compute_loss_func"):
        if others.get(name) is not None:
            raise ConfigError(f"{name} is given, but batches, model and loss of a KD trainer are `cache`, `model` and `loss`")
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs in one process; start one process for each: torchrun or accelerate launch")
    if getattr(args, "parallelism_config", None) is not None:
        raise ConfigError("parallelism_config is given, but ranks that share a copy of the model are not supported here")


def _arguments(args: TrainingArguments, loader: Loader) -> tuple[TrainingArguments, int]:
    """A copy with the number of steps, and the steps of a round, which are about those of an epoch."""
    args = copy.copy(args)
    accumulated = args.gradient_accumulation_steps
    args.per_device_train_batch_size = loader.config.batch_rows // loader.world_size  # for what Trainer logs
    if args.max_steps > 0:
        return args, math.ceil(loader.num_batches(0) / accumulated)
    args.max_steps = math.ceil(num_stream_batches(loader, args.num_train_epochs) / accumulated)
    return args, math.ceil(args.max_steps / args.num_train_epochs)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
