"""Items of the `datasets` library: saved by `save_to_disk`, a folder of data files, or a name on the hub; whole or streamed.

Imported only when input.format is `dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.capture.content import Item, Place, parse_content
from kdcache.capture.table_files import column_values
from kdcache.config.capture import InputConfig
from kdcache.errors import InputError, MissingDependencyError

_ROWS_PER_READ = 1024
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")


def read_dataset(config: InputConfig, start: Place, *, field: str) -> Iterator[Item]:
    """An item for each row, from `start.offset` on.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        InputError: the dataset cannot be opened or read, has no such column, or a cell is of the wrong type.
    """
    name = f"{config.dataset}[{config.split}]"
    dataset = _open(config, name)
    _check_column(dataset.column_names, name, field)
    for row, value in enumerate(_values(dataset, start.offset, field, config, name), start.offset):
        source = f"{name}#{row}"
        yield Item(parse_content(value, config.content, f"{source}: column {field!r}"), source, Place(0, row, row))


def _open(config: InputConfig, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", extra="datasets", purpose="input.format 'dataset'") from error
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
        raise InputError(f"dataset {name}: cannot be opened: {type(error).__name__}: {_one_line(error)}") from error


def _split_of(dataset: Any, config: InputConfig, name: str) -> Any:
    if isinstance(dataset, dict):
        if config.split not in dataset:
            raise InputError(
                f"dataset {name}: no split {config.split!r}; it has {', '.join(map(repr, dataset))} (see input.split)"
            )
        dataset = dataset[config.split]
    return dataset.to_iterable_dataset() if config.streaming else dataset


def _check_column(names: list[str] | None, name: str, field: str) -> None:
    if names is not None and field not in names:
        raise InputError(
            f"dataset {name}: no column {field!r}; the columns are {', '.join(map(repr, names))} (see input.field)"
        )


def _values(dataset: Any, start: int, field: str, config: InputConfig, name: str) -> Iterator[Any]:
    try:
        if config.streaming:
            for row in dataset.skip(start):
                _check_column(list(row), name, field)
                yield row[field]
        else:
            rows = dataset.select(range(min(start, len(dataset)), len(dataset))).select_columns([field])
            for table in rows.with_format("arrow").iter(batch_size=_ROWS_PER_READ):
                for chunk in table.column(field).chunks:
                    yield from column_values(chunk, config.content)
    except InputError:
        raise
    except Exception as error:  # as above; a stream meets the network here
        raise InputError(f"dataset {name}: cannot be read: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no further message"
