"""What lies at a path: one of the formats that are known, opened; or a sentence that says what was looked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignCache, ReadConfig
from kdcache.foreign.formats.answers import open_answers
from kdcache.foreign.formats.axolotl import open_axolotl
from kdcache.foreign.formats.columns import open_columns
from kdcache.foreign.formats.distillkit import open_distillkit
from kdcache.foreign.formats.megatron import open_megatron
from kdcache.foreign.formats.nemo_aligner import open_nemo_aligner
from kdcache.foreign.formats.tables import Table, open_table
from kdcache.format import paths

MOST_NAMED = 5
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz")


def is_own_cache(path: str | Path) -> bool:
    """Whether a directory is a cache of ours; a URI can be nothing else."""
    try:
        return "://" in str(path) or (Path(path) / paths.MANIFESTS).is_dir()
    except OSError:  # a name that no file has, or a folder that is closed to us: `open_foreign` says so
        return False


def open_foreign(path: str | Path, reading: ReadConfig) -> ForeignCache:
    """Open what is at the path with the reader of its format.

    Raises:
        InputError: nothing is there, or it is of no known format.
    """
    named = Path(path)
    try:
        is_there = named.exists()
    except OSError as error:
        raise InputError(f"{named}: cannot be read: {error.strerror}") from error
    if not is_there:
        raise InputError(f"{named}: no such file or folder (working directory {Path.cwd()})")
    cache = open_megatron(str(path), reading)
    if cache is not None:
        return cache
    table = open_table(named)
    if table is None:
        raise InputError(_nothing(named))
    # Plain columns last: their names are the loosest. Columns that the user names say that it is that.
    readers = (open_columns,) if {"ids", "values", "entries"} & set(reading.columns) else (
        open_distillkit, open_nemo_aligner, open_answers, open_axolotl, open_columns,
    )  # fmt: skip
    for reader in readers:
        cache = reader(str(path), table, reading)
        if cache is not None:
            return replace(cache, facts={**cache.facts, **_left_out(table, named)})
    raise InputError(
        f"{named}: none of the columns {', '.join(map(repr, table.columns)) or '(none)'} is known to hold ids and values of a "
        "teacher; name them with --column ids=NAME --column values=NAME --column tokens=NAME, or with --column entries=NAME "
        "where one column holds lists of {token_id, logprob}"
    )


def _left_out(table: Table, folder: Path) -> dict[str, str]:
    if not table.left_out:
        return {}
    shown = ", ".join(str(path.relative_to(folder)) for path in table.left_out[:MOST_NAMED])
    return {"not read": f"{len(table.left_out)} files: {shown}{', ...' if len(table.left_out) > MOST_NAMED else ''}"}


def _nothing(path: Path) -> str:
    if path.suffix.lower() in PICKLES:
        return f"{path}: {path.suffix} files may be pickles, which run any code when opened; write Parquet, Arrow or JSON lines"
    return (
        f"{path}: neither a cache of kdcache, nor Parquet, Arrow or JSON-lines files, nor tars that "
        "Megatron-LM's logits saver names (cp0_dp0__100.tar)"
    )
