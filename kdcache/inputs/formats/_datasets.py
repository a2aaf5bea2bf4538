"""Items of the `datasets` library: saved by `save_to_disk`, a folder of data files, or a name on the hub; whole or streamed.

Imported only when input.format is `dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.config.capture import InputConfig
from kdcache.errors import InputError
from kdcache.extras import needed_for
from kdcache.inputs.content import Fields, Item, Start
from kdcache.inputs.formats.base import SourceFormat
from kdcache.inputs.formats.table_files import check_names, item_of, item_values
from kdcache.shown import first_line

_ITEMS_PER_READ = 1024
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")


def read_dataset(config: InputConfig, start: Start, fields: Fields) -> Iterator[Item]:
    """Yield an item for each item, from `start.offset` on.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        InputError: the dataset cannot be opened or read, lacks the column, or a cell has the wrong type.
    """
    name = f"{config.dataset}[{config.split}]"
    dataset = _open(config, name)
    if dataset.column_names is not None:
        check_names(dataset.column_names, f"dataset {name}", fields)
    for item, values in enumerate(_values(dataset, start.offset, fields, config, name), start.offset):
        yield item_of(values, fields, f"{name}#{item}", Start(0, item, item))


def _open(config: InputConfig, name: str) -> Any:
    with needed_for("input.format 'dataset'"):
        import datasets
    assert config.dataset is not None
    folder = Path(config.dataset)
    try:
        if any((folder / file).exists() for file in _SAVED_TO_DISK):
            return _split_of(datasets.load_from_disk(str(folder)), config, name)
        return datasets.load_dataset(
            config.dataset, config.dataset_config, split=config.split, revision=config.revision, streaming=config.streaming
        )
    except InputError:
        raise
    except Exception as error:  # the library raises what its builders, file systems and HTTP clients raise
        raise InputError(f"dataset {name}: cannot be opened: {type(error).__name__}: {first_line(error)}") from error


def _split_of(dataset: Any, config: InputConfig, name: str) -> Any:
    if isinstance(dataset, dict):
        if config.split not in dataset:
            raise InputError(
                f"dataset {name}: no split {config.split!r}; it has {', '.join(map(repr, dataset))} (see input.split)"
            )
        dataset = dataset[config.split]
    return dataset.to_iterable_dataset() if config.streaming else dataset


def _values(dataset: Any, start: int, fields: Fields, config: InputConfig, name: str) -> Iterator[dict[str, Any]]:
    """Yield what is read of each item, by name."""
    try:
        if config.streaming:
            for item in dataset.skip(start):
                check_names(list(item), f"dataset {name}", fields)
                yield {column: item[column] for column in fields.read_names(list(item))}
        else:
            columns = fields.read_names(dataset.column_names)
            items = dataset.select(range(min(start, len(dataset)), len(dataset))).select_columns(columns)
            for table in items.with_format("arrow").iter(batch_size=_ITEMS_PER_READ):
                for batch in table.to_batches():
                    batch.validate(full=True)  # Arrow would follow offsets out of a buffer, which ends the process
                    yield from item_values(batch, fields)
    except InputError:
        raise
    except Exception as error:  # as above; a stream meets the network here
        raise InputError(f"dataset {name}: cannot be read: {type(error).__name__}: {first_line(error)}") from error


DATASET = SourceFormat(read_dataset)
