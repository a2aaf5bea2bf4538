"""Accelerate, Lightning, TRL, torchtitan's contract and datasets: a stopped run goes on as if it had not been stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from adapter_cases import LR, OPTIONS, first_batches, make_student, plain_losses
from torch.distributed.checkpoint.stateful import Stateful

from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, StateError
from kdcache.loader.batches.batch import Batch
from kdcache.loader.loader import Loader
from kdcache.loader.rows.layout import EpochLayout
from kdcache.loader.torch_batches import to_torch
from kdcache.train.adapters import BatchStream, StudentLoss, TitanDataLoader, iterable_dataset, num_stream_batches


@pytest.fixture(scope="module")
def expected(small_cache: Path) -> list[float]:
    return plain_losses(small_cache, OPTIONS, 9)


def test_a_plain_loop_resumed_from_the_loaders_state_is_the_loop_that_was_not_stopped(
    small_cache: Path, expected: list[float]
) -> None:
    losses: list[float] = []
    saved: dict[str, Any] = {}
    for last_step in (4, 9):
        model = make_student()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        with Loader(small_cache, OPTIONS) as loader:
            stream, loss_of = BatchStream(loader), StudentLoss(model, loader)
            if saved:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                stream.load_state_dict(saved["stream"])
            while len(losses) < last_step:
                loss = loss_of(model, stream[stream.next_index])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            parts = {"model": model, "optimizer": optimizer, "stream": stream}
            saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
            stream.pause()
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_stream_gives_the_same_batch_by_number_in_turn_and_in_rounds(small_cache: Path) -> None:
    wanted = [batch.input_ids_BT for batch in first_batches(small_cache, OPTIONS, 10)]
    with Loader(small_cache, OPTIONS) as loader:
        stream = BatchStream(loader, round_batches=4)
        assert len(stream) == 4
        for number in (7, 8, 0, 3, 9):
            assert torch.equal(stream[number].input_ids_BT, wanted[number])
        stream[5]
        rest = [batch.input_ids_BT for batch in stream]
        assert all(map(torch.equal, rest, wanted[6:8]))
        assert len(rest) == 2
        whole = [batch.input_ids_BT for batch in stream][:2]
        assert all(map(torch.equal, whole, wanted[8:]))
        stream.pause()
        assert num_stream_batches(loader, 2) == sum(loader._layout_of(epoch).num_batches for epoch in (0, 1))
        with pytest.raises(StateError, match="not a state of a kdcache stream"):
            stream.load_state_dict(loader.state_dict())
        with pytest.raises(ConfigError, match="round_batches is 0"):
            BatchStream(loader, round_batches=0)


class Planning(Loader):
    """Says which epochs were planned."""

    def _layout_of(self, epoch: int) -> EpochLayout:
        self.planned.append(epoch)
        return super()._layout_of(epoch)

    def __init__(self, *args: Any, **fields: Any) -> None:
        self.planned: list[int] = []
        super().__init__(*args, **fields)


def test_a_jump_near_a_known_place_plans_no_epochs_from_the_beginning(small_cache: Path) -> None:
    with Loader(small_cache, OPTIONS) as loader:
        stream, last = BatchStream(loader), num_stream_batches(loader, 30)
        wanted = {number: stream[number].input_ids_BT for number in (last - 6, last - 1, last, last + 5)}
        stream[last]
        state = stream.state_dict()
        stream.pause()
    loader = Planning(small_cache, OPTIONS)
    with loader:
        stream = BatchStream(loader)
        stream.load_state_dict(state)
        for number, ids_BT in wanted.items():
            assert torch.equal(stream[number].input_ids_BT, ids_BT)
        stream.pause()
        assert set(loader.planned) <= {0, *range(27, 33)}
        assert torch.equal(stream[0].input_ids_BT, first_batches(small_cache, OPTIONS, 1)[0].input_ids_BT)
        stream.pause()
        assert set(loader.planned) <= {0, *range(27, 33)}


def test_accelerate_saves_the_loaders_place_and_goes_on_from_it(
    small_cache: Path, expected: list[float], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    from kdcache.train.adapters import AcceleratedStream

    losses: list[float] = []
    for last_step in (4, 9):
        accelerator = accelerate.Accelerator(cpu=True)
        plain = make_student()
        model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=0.0))
        stream = AcceleratedStream(accelerator, small_cache, OPTIONS)
        loss_of = StudentLoss(plain, stream.loader)
        if losses:
            accelerator.load_state(str(tmp_path / "state"))
        while len(losses) < last_step:
            for batch in stream:
                loss = loss_of(model, batch, loss_of.scale([batch]))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                if len(losses) == last_step:
                    break
        accelerator.save_state(str(tmp_path / "state"))
        stream.close()
    assert losses == pytest.approx(expected, rel=1e-6)


def lightning_losses(
    cache: Path,
    folder: Path,
    *,
    stop: int | None,
    resume: bool,
    options: LoaderConfig = OPTIONS,
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    **trainer_options: Any,
) -> list[float]:
    """Of this call's steps; a checkpoint after every second."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from kdcache.train.adapters import KDDataModule

    class Student(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = make_student(attention_dropout=0.0), []

        def setup(self, stage: str) -> None:
            loader = self.trainer.datamodule.stream.loader
            self.loss_of = [StudentLoss(self.model, loader, loss)]  # in a list: no second owner

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            if len(self.losses) == stop:
                raise InterruptedError
            self.loss_of[0].at = (self.global_step, 9)
            loss = self.loss_of[0](self.model, batch, self.loss_of[0].scale([batch]))
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=0.0)

    student = Student()
    trainer = lightning.Trainer(
        max_steps=9, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_last=True)],
        default_root_dir=folder, use_distributed_sampler=False, **trainer_options,
    )  # fmt: skip
    checkpoint = folder / "last.ckpt" if resume else None
    try:
        trainer.fit(student, datamodule=KDDataModule(cache, options), ckpt_path=checkpoint)
    except InterruptedError:
        assert stop is not None
    return student.losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 6, 7])
def test_lightning_goes_on_behind_the_checkpoint(small_cache: Path, expected: list[float], tmp_path: Path, stop: int) -> None:
    before = lightning_losses(small_cache, tmp_path, stop=stop, resume=False)
    after = lightning_losses(small_cache, tmp_path, stop=None, resume=True)
    first = stop // 2 * 2
    assert before == pytest.approx(expected[:stop], rel=1e-6)
    assert after == pytest.approx(expected[first:], rel=1e-6)


def test_trl_trains_from_a_cache_and_goes_on(
    small_cache: Path, expected: list[float], tmp_path: Path, tiny_model_dir: Path
) -> None:
    trl = pytest.importorskip("trl")
    from test_adapters_transformers import StopAt, arguments
    from transformers import AutoTokenizer

    from kdcache.train.adapters import KDSFTTrainer

    fields = {k: v for k, v in arguments(tmp_path).to_dict().items() if k in _GIVEN}
    for stop, resume in ((5, False), (None, True)):
        trainer = KDSFTTrainer(
            make_student(),
            trl.SFTConfig(**fields, bf16=False, gradient_checkpointing=False),
            cache=small_cache,
            loader=OPTIONS,
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
            callbacks=[StopAt(stop)],
        )
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            assert stop
        trainer.close()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == pytest.approx(expected, rel=1e-4)


_GIVEN = ("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "adam_beta2",
          "optim", "logging_steps", "save_steps", "report_to", "use_cpu", "disable_tqdm")  # fmt: skip


def titan_batches(loader: TitanDataLoader, num_batches: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    return list(islice(_titan_generator(loader), num_batches))


def _titan_generator(loader: TitanDataLoader) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What torchtitan's `Trainer.batch_generator` and `post_dataloading_process` do with a loader."""
    iterator = iter(loader)
    while True:
        input_dict, labels = next(iterator)
        assert set(input_dict) >= {"input", "positions"}
        assert input_dict["input"].shape == input_dict["positions"].shape == labels.shape
        yield input_dict, labels


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_loop_over_torchtitans_batches_goes_on_from_its_checkpoint(
    small_cache: Path, expected: list[float], tmp_path: Path
) -> None:
    """The loader, the model and the optimiser in one checkpoint of torch.distributed.checkpoint, as torchtitan keeps them."""
    losses: list[float] = []
    for last_step in (4, 9):
        model = make_student()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        loader = TitanDataLoader(small_cache, OPTIONS, with_batch=True)
        with Loader(small_cache, OPTIONS) as own:
            loss_of = StudentLoss(model, own)
        if losses:
            saved = torch.load(tmp_path / "model.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            dcp.load({"dataloader": loader}, checkpoint_id=tmp_path / "step-4", no_dist=True)
        for inputs, _ in titan_batches(loader, last_step - len(losses)):
            loss = loss_of(model, inputs["batch"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        dcp.save({"dataloader": loader}, checkpoint_id=tmp_path / f"step-{last_step}", no_dist=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "model.pt")
        loader.close()
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_flat", [True, False])
def test_torchtitans_contract(small_cache: Path, tmp_path: Path, is_flat: bool) -> None:
    """Endless over epochs; the state goes through torch.distributed.checkpoint, to another number of ranks."""
    wanted = first_batches(small_cache, OPTIONS, 9)
    loader = TitanDataLoader(small_cache, OPTIONS, is_flat=is_flat, with_batch=True)
    assert isinstance(loader, Stateful)
    for (inputs, labels), batch in zip(titan_batches(loader, 5), wanted, strict=False):
        shape = (128,) if is_flat else (2, 64)
        assert torch.equal(inputs["input"], batch.input_ids_BT.long().reshape(shape))
        assert torch.equal(inputs["positions"], batch.position_ids_BT.long().reshape(shape))
        assert torch.equal(labels, batch.target_ids_BT.long().reshape(shape))
        assert torch.equal(inputs["batch"].teacher.logprobs_PK, batch.teacher.logprobs_PK)
    dcp.save({"dataloader": loader}, checkpoint_id=tmp_path / "step-5", no_dist=True)
    loader.close()
    halves = [TitanDataLoader(small_cache, OPTIONS, dp_rank=rank, dp_world_size=2, is_flat=is_flat) for rank in (0, 1)]
    for half in halves:
        dcp.load({"dataloader": half}, checkpoint_id=tmp_path / "step-5", no_dist=True)
    parts = [titan_batches(half, 4) for half in halves]
    for number, batch in enumerate(wanted[5:]):
        ids = torch.cat([part[number][0]["input"] for part in parts])
        assert torch.equal(ids, batch.input_ids_BT.long().reshape(ids.shape))
    halves[0].load_state_dict({})
    with pytest.raises(StateError, match="dp_rank_0"):
        halves[0].load_state_dict({"version": 1, "dp_rank_0": {}})
    for half in halves:
        half.close()


def test_a_datasets_stream_resumes_at_every_row_and_reads_few_again(small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from kdcache.loader.view import PackedView

    options = LoaderConfig(seq_len=64, batch_rows=1, seed=3)
    view = PackedView(small_cache, options)
    wanted = [view[row].input_ids_BT for row in range(len(view))]
    read: list[int] = []
    original = PackedView.__getitem__

    def counted(self: PackedView, row: int) -> Any:
        read.append(row)
        return original(self, row)

    monkeypatch.setattr(PackedView, "__getitem__", counted)
    for stop in range(len(wanted)):
        dataset = iterable_dataset(small_cache, options, rows_per_shard=2)
        iterator, state = iter(dataset), dataset.state_dict()
        for _ in range(stop):
            next(iterator)
            state = dataset.state_dict()
        read.clear()
        resumed = iterable_dataset(small_cache, options, rows_per_shard=2)
        resumed.load_state_dict(copy.deepcopy(state))
        rest = [example["input_ids_BT"] for example in resumed]
        assert len(rest) == len(wanted) - stop
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(rest, wanted[stop:], strict=True))
        assert min(read, default=0) >= stop - 2
    view.close()


def test_a_loop_over_a_datasets_stream_goes_on_from_its_state(small_cache: Path) -> None:
    pytest.importorskip("datasets")
    options = LoaderConfig(seq_len=64, batch_rows=1, seed=3)
    whole, resumed = dataset_losses(small_cache, options, None), dataset_losses(small_cache, options, 3)
    assert len(whole) >= 5
    assert resumed == whole


def dataset_losses(cache: Path, options: LoaderConfig, stop: int | None) -> list[float]:
    """Of one epoch, each row a step; with another dataset object behind the stop."""
    model, losses = make_student(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    with Loader(cache, options) as loader:
        loss_of = StudentLoss(model, loader)
    state: dict[str, Any] | None = None
    for num_steps in (stop, None) if stop else (None,):
        dataset = iterable_dataset(cache, options, rows_per_shard=2)
        if state is not None:
            dataset.load_state_dict(state)
        for example in islice(dataset, num_steps):
            loss = loss_of(model, to_torch(Batch(**example)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            state = copy.deepcopy(dataset.state_dict())
    return losses


def test_datasets_split_by_rank_holds_every_row_once(small_cache: Path) -> None:
    pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    options = LoaderConfig(seq_len=64, batch_rows=1, seed=3)
    dataset = iterable_dataset(small_cache, options, rows_per_shard=1)
    rows = [example["input_ids_BT"].tobytes() for example in dataset]
    ranks = [[e["input_ids_BT"].tobytes() for e in split_dataset_by_node(dataset, rank=r, world_size=2)] for r in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(rows)
    assert len(set(rows)) == len(rows)
