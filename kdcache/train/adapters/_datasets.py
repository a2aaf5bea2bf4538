"""One epoch of packed rows as an IterableDataset of the datasets library, in the loader's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.batches.batch import ARRAYS, SCALARS
from kdcache.loader.caches import CacheLike
from kdcache.loader.view import PackedView


def iterable_dataset(
    cache: CacheLike | Sequence[CacheLike],
    options: LoaderConfig = LoaderConfig(),  # noqa: B008 - frozen
    *,
    epoch: int = 0,
    rows_per_shard: int = 16,
) -> datasets.IterableDataset:
    """Rows of `seq_len` tokens; each example is a batch of one row, as a dict: `Batch(**example)`.

    `state_dict` and `load_state_dict` are exact, and cheap: `datasets` resumes by going through what came before in the shard
    once more, and so a shard is a few rows here. Ranks: `datasets.distributed.split_dataset_by_node`, with a number of ranks
    that divides `num_shards`; a state is then that of one rank and of this number of them, unlike a Loader's. `shuffle` is not
    needed, and would shuffle shards on top of the options' own order.

    Args:
        cache: as for a Loader; it stays open as long as the dataset is used.
        options: as for a PackedView.
        epoch: whose order; make another dataset for the next.
        rows_per_shard: most rows that a resume reads once more.

    Raises:
        ConfigError: see PackedView; rows_per_shard below 1.
    """
    if rows_per_shard < 1:
        raise ConfigError(f"rows_per_shard is {rows_per_shard}, but must be at least 1")
    view = PackedView(cache, options, epoch)
    firsts = list(range(0, len(view), rows_per_shard))
    # datasets takes each entry of a list for a shard, and everything else as it is.
    return datasets.IterableDataset.from_generator(
        _examples, gen_kwargs={"first_rows": firsts, "view": view, "rows_per_shard": rows_per_shard}
    )


def _examples(first_rows: list[int], view: PackedView, rows_per_shard: int) -> Iterator[dict[str, Any]]:
    for first in first_rows:
        for row in range(first, min(first + rows_per_shard, len(view))):
            batch = view[row]
            yield {name: getattr(batch, name) for name in (*ARRAYS, "teacher", "roles_P", *SCALARS)}
