"""A student trained from a cache: loader -> packed forward -> fused sparse loss -> AdamW. One process, one device.

It proves the pipeline and serves as the example; run again on the same directory it goes on exactly where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from kdcache.bars import bar_options
from kdcache.config.train import TrainConfig
from kdcache.errors import ConfigError, InputError, NotFiniteError
from kdcache.half_precision import warn_if_emulated
from kdcache.loader.cache import Cache, open_cache
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch, to_torch
from kdcache.shown import get_logger
from kdcache.teacher import load_tokenizer
from kdcache.train.body import vocab_size
from kdcache.train.evaluation.heldout import HeldoutSequence, read_heldout
from kdcache.train.evaluation.scores import heldout_nats_per_token
from kdcache.train.finite import batch_reason, check_weights, not_finite_weight, shown_sources
from kdcache.train.init.initial import Initial, initial_student
from kdcache.train.packed import check_architecture, logits_head
from kdcache.train.runs.checkpoint import RunState, load_checkpoint, newest_checkpoint, save_checkpoint
from kdcache.train.runs.run_folder import RunFolder
from kdcache.train.schedule import learning_rate
from kdcache.train.step import BatchLoss, check_loss, make_optimizer, optimize
from kdcache.train.student import check_against_cache, without_progress_bars
from kdcache.train.terms.engine import LossTerms, with_needs
from kdcache.train.terms.setting import set_up_terms

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        out: its directory.
        model: the student in the Hugging Face layout, tokenizer included.
        num_steps: of the whole run; num_resumed of them were done before.
        num_tokens: tokens read in the whole run, padding not counted.
        num_skipped: steps that made no update, see `TrainConfig.max_skipped_steps`.
        seconds: this process's share of the training loop.
        heldout_nats_per_token: after the last step, or None where nothing was measured.
    """

    out: Path
    model: Path
    num_steps: int
    num_resumed: int
    num_tokens: int
    num_skipped: int
    seconds: float
    heldout_nats_per_token: float | None


def train(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Train a student, or resume the run in `config.out`.

    Args:
        config: the whole run.
        show_progress: a bar on stderr once two seconds have passed.

    Raises:
        ConfigError, MismatchError: see `build_student`, `check_against_cache`, `RunFolder`.
        CacheNotFoundError, CorruptCacheError: the cache cannot be read; what was trained up to the last checkpoint stays.
        InputError: held-out data that cannot be read, or a cache that is not complete or has no supervised position.
        LossError: a loss that would be wrong for the cache's selection; see `check_loss`.
        NotFiniteError: a loss, gradient, weight or held-out measure is not finite; the last checkpoint stays, no model is
            published.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with open_cache(config.cache, remote=config.remote) as cache:
        _check_cache(config, cache)
        heldout = _heldout(config)
        initial = _student(config, cache)
        loader_config = with_needs(config.loader, LossTerms(config.loss).needs())
        with Loader(cache, loader_config) as loader, RunFolder(config, cache.snapshot) as folder:
            initial.keep(folder)
            return Trainer(config, initial.model, loader, folder, heldout).run(show_progress)


class Trainer:
    """The state of a run: model, optimiser, loader and counters. `train` makes one."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        loader: Loader,
        folder: RunFolder,
        heldout: Sequence[HeldoutSequence] = (),
    ) -> None:
        self.config, self.model, self.loader, self.folder, self.heldout = config, model, loader, folder, heldout
        self._loss = BatchLoss(config.loss, logits_head(model))
        self._terms = set_up_terms(self._loss.terms, model, loader.caches, seed=config.seed)
        self.optimizer = make_optimizer(model, config.optimizer, self._terms, config.loss.projector_lr)
        self.num_steps = config.steps or num_batches(loader, config.epochs or 1)
        self.step = self.num_tokens = self.num_skipped = 0
        self._num_positions = 0
        self.last_heldout: float | None = None
        self._resume()

    def run(self, show_progress: bool = False) -> TrainResult:
        """Train to the end, save the model, and say what was done."""
        start, first_step = time.perf_counter(), self.step
        self.model.train()
        options = bar_options(total=self.num_steps, initial=self.step, delay=2, unit="step", disable=not show_progress)
        bar = tqdm(**options)
        with bar:
            if self.step == 0:
                self._measure()
            for batch in self._batches():
                loss = self._train_on(batch)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        self._check_something_was_learned_from(first_step)
        self.folder.publish_model(self._save_model)
        return TrainResult(
            out=self.folder.root,
            model=self.folder.model,
            num_steps=self.num_steps,
            num_resumed=first_step,
            num_tokens=self.num_tokens,
            num_skipped=self.num_skipped,
            seconds=seconds,
            heldout_nats_per_token=self.last_heldout,
        )

    def _train_on(self, batch: TorchBatch) -> float:
        rate = learning_rate(self.step, self.num_steps, self.config.optimizer)
        at = (self.step, self.num_steps)
        loss, grad_norm = optimize(self.model, self.optimizer, batch, self.config, rate, self._loss, at)
        self.step += 1
        self._num_positions += len(batch.flat_positions_P)
        self.num_tokens += int((batch.segment_ids_BT > 0).sum())
        reason = batch_reason(loss, grad_norm)
        further: dict[str, Any] = {} if reason is None else {"left_out": reason}
        padding_mass = self._loss.padding_mass(batch, vocab_size(self.model))
        if padding_mass is not None:
            further["padding_mass"] = padding_mass
        report = self._terms.report()
        if len(report) > 1:  # of a term alone without measures, it would be the loss again
            further["terms"] = report
        self.folder.append_metrics(step=self.step, tokens=self.num_tokens, loss=loss, lr=rate, grad_norm=grad_norm, **further)
        if reason is not None:
            self._skip(reason)
        is_last = self.step == self.num_steps
        if is_last or self.step % self.config.heldout.every_steps == 0:
            self._measure()
        if is_last or self.step % self.config.checkpoint_every_steps == 0:
            self._checkpoint()
        return loss

    def _batches(self) -> Iterator[TorchBatch]:
        """Batches until the last step; each loop over the loader ends an epoch, the next begins another."""
        while self.step < self.num_steps:
            for batch in self.loader:
                yield to_torch(batch).to(self.model.device)
                if self.step == self.num_steps:
                    return

    def _check_something_was_learned_from(self, first_step: int) -> None:
        if self.step > first_step and self._num_positions == 0:
            raise ConfigError(
                f"none of the {self.step - first_step} steps had a position to learn from, so no model is published; "
                "loader.mask leaves nothing of this cache: plain text has no roles, so use mask.roles only with chats"
            )

    def _measure(self) -> None:
        if self.heldout:
            self.last_heldout = heldout_nats_per_token(self.model, self.heldout)
            self.folder.append_metrics(step=self.step, tokens=self.num_tokens, heldout_nats_per_token=self.last_heldout)
            if not math.isfinite(self.last_heldout):
                raise self._stopped(f"the held-out loss is {self.last_heldout}")

    def _skip(self, reason: str) -> None:
        """Count a step that made no update, or end the run."""
        sources = shown_sources(self.loader.sources_before(self.loader.state_dict()))
        weight = not_finite_weight(self.model) or not_finite_weight(self._terms)
        if weight is not None:  # every further step would be left out too
            raise self._stopped(f"{reason}, {sources}: after step {self.step - 1} the weight {weight!r} is not finite")
        if self.num_skipped == self.config.max_skipped_steps:
            raise self._stopped(f"{reason}, {sources}", ", or leave such steps out with a higher max_skipped_steps")
        self.num_skipped += 1

    def _stopped(self, reason: str, advice: str = "") -> NotFiniteError:
        kept = newest_checkpoint(self.folder.checkpoints)
        return NotFiniteError(
            f"step {self.step}: {reason}. No model is published; "
            f"{f'the checkpoint {kept.name} stays' if kept else 'no checkpoint was kept yet'}. Train with a lower optimizer.lr "
            f"or a longer optimizer.warmup_fraction in another `out`{advice}"
        )

    def _checkpoint(self) -> None:
        for learned in (self.model, self._terms):
            check_weights(learned, f"step {self.step}:")
        state = RunState(
            step=self.step,
            num_tokens=self.num_tokens,
            metrics_bytes=self.folder.sync_metrics(),
            heldout_nats_per_token=self.last_heldout,
            loader=self.loader.state_dict(),
            num_skipped=self.num_skipped,
        )
        save_checkpoint(self.folder.checkpoints, self.model, self.optimizer, state, self._terms)

    def _resume(self) -> None:
        path = newest_checkpoint(self.folder.checkpoints)
        if path is None:
            self.folder.cut_metrics(0)
            return
        state = load_checkpoint(path, self.model, self.optimizer, self._terms)
        self.loader.load_state_dict(state.loader)
        for learned in (self.model, self._terms):
            check_weights(learned, f"{path}:")
        self.step, self.num_tokens, self.last_heldout = state.step, state.num_tokens, state.heldout_nats_per_token
        self.num_skipped = state.num_skipped
        self.folder.cut_metrics(state.metrics_bytes)

    def _save_model(self, path: Path) -> None:
        name = self.config.student.tokenizer or self.config.student.model
        with without_progress_bars():
            self.model.save_pretrained(path)
            AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(path)
        for name, tensors in self._terms.exported().items():
            save_file(tensors, path / f"{name}.safetensors")


def num_batches(loader: Loader, num_epochs: int) -> int:
    """Batches of the first epochs; packed epochs differ a little."""
    return sum(loader.num_batches(epoch) for epoch in range(num_epochs))


def _check_cache(config: TrainConfig, cache: Cache) -> None:
    manifest = cache.manifest
    if not (manifest.is_complete or "incomplete" in config.accept):
        raise InputError(
            f"{config.cache}: the capture has published {len(manifest.shards)} of {manifest.plan.num_units} units; "
            "run `kdcache capture` again to finish it, or set `accept: [incomplete]` to train on these"
        )
    # Before the student is built: what the cache is not enough for.
    check_loss(config.loss, manifest)
    for note in LossTerms(config.loss).notes(manifest):
        log.warning("%s", note)
    if not cache.num_positions_S.any():
        raise InputError(f"{config.cache}: the cache has no supervised position to train on")


def _student(config: TrainConfig, cache: Cache) -> Initial:
    device = _device(config)
    initial = initial_student(config, cache, device)
    model = initial.model
    longest = int(cache.num_tokens_S.max())
    identity, accept = cache.manifest.identity, config.accept
    check_against_cache(model, config.student, identity, longest_sequence=longest, accept=accept)
    check_architecture(model, is_packed=config.loader.packing != "none")
    warn_if_emulated(config.dtype, device.type, "`dtype: float32`")
    return replace(initial, model=model.to(device))  # pyright: ignore[reportArgumentType]


def _device(config: TrainConfig) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device is 'cuda', but torch finds no CUDA device; use 'auto' or 'cpu'")
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")


def _heldout(config: TrainConfig) -> Sequence[HeldoutSequence]:
    if config.heldout.data is None:
        return ()
    tokenizer = load_tokenizer(config.student.tokenizer or config.student.model)
    return read_heldout(config.heldout.data, tokenizer, window=config.heldout.window, max_tokens=config.heldout.max_tokens)
