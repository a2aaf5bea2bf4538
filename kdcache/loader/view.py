"""Packed rows by index: for samplers, trainers that skip by index, and looking at a batch by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

from kdcache.config.loader import LoaderConfig
from kdcache.loader.batches.batch import Batch
from kdcache.loader.caches import CacheLike, CacheSet
from kdcache.loader.checks import check_config, check_epoch
from kdcache.loader.read import read_rows
from kdcache.loader.rows.layout import EpochLayout


class PackedView:
    """The rows of one epoch, in the order in which a Loader of this config gives them; reads nothing until asked.

    `view[i]` is a Batch of one row of seq_len; `stack_batches([view[i], ...])` joins several. Can be pickled if the readers
    can.

    Args:
        caches: as for a Loader.
        config: as for a Loader; `pad_to`, `num_threads` and `prefetch_batches` do not matter, and `batch_rows` and
            `max_batch_tokens` only for the order of rows with `group_by_length`.
        epoch: whose order.

    Raises:
        ConfigError: a setting out of range, a sequence longer than a row, an empty cache. MismatchError: see Loader.
    """

    def __init__(self, caches: CacheLike | Sequence[CacheLike], config: LoaderConfig, epoch: int = 0) -> None:
        check_epoch(epoch)
        self._caches = CacheSet(caches, config)
        self.config, self.epoch = config, epoch
        self._make_layout()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "layout"}  # the layout holds the whole index

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_layout()

    def __len__(self) -> int:
        return self.layout.num_rows

    def __iter__(self) -> Iterator[Batch]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Batch:
        """Row `row` as a batch of one; negative indices count from the end. Raises IndexError outside."""
        row_index = index(row)
        if row_index < 0:
            row_index += len(self)
        return read_rows(self._caches, [self.layout.row(row_index)], self.config.seq_len, self.config.mask)

    def close(self) -> None:
        """Close the caches that were opened here."""
        self._caches.close()

    def _make_layout(self) -> None:
        tables = self._caches.tables()
        check_config(self.config, tables)
        self.layout = EpochLayout(tables, self.config, self.epoch)
