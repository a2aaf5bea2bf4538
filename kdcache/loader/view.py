"""Packed rows by number: for samplers, trainers that skip by index, and looking at a batch by hand."""

from __future__ import annotations

from collections.abc import Iterator
from operator import index

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.base import Reader
from kdcache.loader.batch import Batch
from kdcache.loader.plan import EpochPlan, check_options
from kdcache.loader.read import read_rows


class PackedView:
    """The rows of one epoch, in the order in which a Loader with these options gives them; reads nothing until asked.

    `view[i]` is a Batch of one row; `stack_batches([view[i], ...])` joins several. Can be pickled if the reader can.

    Args:
        reader: of the cache.
        options: as for a Loader; `batch_rows`, `num_threads` and `prefetch_batches` do not matter.
        epoch: whose order.

    Raises:
        ConfigError: options out of range, a sequence longer than a row, an empty cache.
    """

    def __init__(self, reader: Reader, options: LoaderConfig, epoch: int = 0) -> None:
        check_options(options, reader.num_tokens_S)
        if epoch < 0:
            raise ConfigError(f"epoch is {epoch}, expected 0 or more")
        self.reader = reader
        self.options = options
        self.plan = EpochPlan(reader.num_tokens_S, options, epoch)

    def __len__(self) -> int:
        return self.plan.num_rows

    def __iter__(self) -> Iterator[Batch]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Batch:
        """Row `row` as a batch of one; negative numbers count from the end. Raises IndexError outside."""
        number = index(row)
        if number < 0:
            number += len(self)
        return read_rows(self.reader, [self.plan.row(number)], seq_len=self.options.seq_len)
