"""DistillKit's Parquet (and Arrow, after packing): compressed logprobs, packed ids, the text's ids.

The position stored at index r of an item is position r: the sampler drops the engine's empty first position. It
appends a padding token to the text, so the last position is about that token unless the text was cut at the longest
length. The config is not in
the data files: `compression_config.yaml` lies next to them, or the user names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.yaml_text import parse_yaml
from kdcache.errors import ConfigError, InputError
from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence, ReadConfig, check_size, to_ids, without_positions
from kdcache.foreign.formats.distillkit_codec import (
    MAX_CONDITION,
    Config,
    FitQuality,
    LegacyConfig,
    decode_ids,
    decode_legacy,
    decode_values,
    fit_quality,
    parse_config,
)
from kdcache.foreign.formats.distillkit_config import wrong_config
from kdcache.foreign.formats.tables import Table, flat, nested
from kdcache.store.files.regular import open_regular

CONFIG_NAME = "compression_config.yaml"
COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")
MAX_CONFIG_BYTES = 2**20

_POSITIONS_AT_ONCE = 256
POSITIONS_LOOKED_AT = 512
"""Positions that are decoded under other configs, where they look wrong under the one that was named."""


def open_distillkit(path: str, table: Table, reading: ReadConfig) -> ForeignCache | None:
    """Open the cache at a path; None unless its columns are DistillKit's.

    Raises:
        InputError: the config is missing, or does not fit the columns.
    """
    is_legacy = set(LEGACY) <= set(table.columns)
    if "input_ids" not in table.columns or not (is_legacy or set(COMPRESSED) <= set(table.columns)):
        return None
    config, where = _read_config(Path(path), reading.config)
    if isinstance(config, LegacyConfig) != is_legacy:
        kinds = ("the older layout", "the newer one")
        raise InputError(f"{path}: the columns are of {kinds[not is_legacy]}, but {where} is a config of {kinds[is_legacy]}")
    fit = None if isinstance(config, LegacyConfig) else fit_quality(config)
    return ForeignCache(
        format="distillkit",
        title=f"DistillKit {'legacy ' if is_legacy else ''}compressed logprobs ({table.kind})",
        path=path,
        values=reading.values or "logprobs",
        read=partial(_sequences, table, config),
        facts=_facts(config, where, fit),
        vocab_size=config.vocab_size if isinstance(config, LegacyConfig) else config.d,
        approximate_from=config.exact_k if config.exact_k < config.k else None,
        findings=(*_fit_findings(fit), *(() if fit is not None and fit.is_broken else _config_findings(table, config))),
    )


def _config_findings(table: Table, config: Config | LegacyConfig) -> Iterator[Finding]:
    """What the first positions say of the config; nothing of the older layout, whose columns are of fixed widths."""
    if isinstance(config, LegacyConfig):
        return
    parts: list[NDArray[np.uint8]] = []
    hits: list[NDArray[np.bool_]] = []
    for where, item in table.items(["input_ids", *COMPRESSED]):
        tokens = flat(item.get("input_ids"), f"{where}: input_ids")
        values, ids = (_rectangle(item.get(name), f"{where}: {name}") for name in COMPRESSED)
        num_looked_at = 0 if tokens is None else min(len(values), len(ids), len(tokens) - 1, POSITIONS_LOOKED_AT)
        if num_looked_at < 1 or values.shape[1] != config.value_bytes or ids.shape[1] != config.id_bytes:
            continue  # reading says so, in words
        parts.append(_as_bytes(values[:num_looked_at]))
        named_PK = decode_ids(_as_bytes(ids[:num_looked_at]), config)
        text_N = np.append(to_ids(where, tokens), (-1, -1))
        hits.append(
            np.stack([(named_PK == text_N[at : at + num_looked_at, None]).any(axis=1) for at in (0, 1, 2)])
        )  # of each shift
        if sum(map(len, parts)) >= POSITIONS_LOOKED_AT:
            break
    found = (
        wrong_config(np.concatenate(parts), float(np.concatenate(hits, axis=1).mean(axis=1).max()), config) if parts else None
    )
    if found is not None:
        yield found


def _sequences(table: Table, config: Config | LegacyConfig) -> Iterator[ForeignSequence]:
    names = ["input_ids", "attention_mask", *(LEGACY if isinstance(config, LegacyConfig) else COMPRESSED)]
    for where, item in table.items(names):
        tokens = flat(item.get("input_ids"), f"{where}: input_ids")
        if tokens is None:
            yield without_positions(where, None)
            continue
        ids_PK, values_PK = _decode(item, config, where)
        documents = flat(item.get("attention_mask"), f"{where}: attention_mask")
        yield from _documents(where, to_ids(where, tokens), ids_PK, values_PK, documents)


def _documents(
    where: str, ids_N: NDArray[np.int64], ids_PK: NDArray[np.int64], values_PK: NDArray[np.float64], documents: Any
) -> Iterator[ForeignSequence]:
    """One sequence, or one for each document that the packing pass has numbered in attention_mask."""
    num_positions = len(ids_PK)
    edges = [0, max(len(ids_N), num_positions)]
    if documents is not None and len(documents) == len(ids_N) and num_positions <= len(ids_N) and len(documents):
        edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(ids_N)]
    for num_looked_at, (start, end) in enumerate(pairwise(edges)):
        positions = slice(start, min(end, num_positions))
        counts_P = np.full(max(positions.stop - positions.start, 0), ids_PK.shape[1], np.int64)
        yield ForeignSequence(
            source=where if len(edges) == 2 else f"{where}.{num_looked_at}",
            input_ids_N=ids_N[start:end],
            positions_P=np.arange(len(counts_P)),
            counts_P=counts_P,
            token_ids_E=ids_PK[positions].reshape(-1),
            values_E=values_PK[positions].reshape(-1),
        )


def _decode(item: Any, config: Config | LegacyConfig, where: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    names = LEGACY if isinstance(config, LegacyConfig) else COMPRESSED
    parts = [_rectangle(item.get(name), f"{where}: {name}") for name in names]
    num_positions = len(parts[0])
    if any(len(part) != num_positions for part in parts):
        raise InputError(f"{where}: {' and '.join(f'{len(p)} positions of {n}' for n, p in zip(names, parts, strict=True))}")
    check_size(where, np.full(num_positions, config.k, np.int64))
    if not num_positions:
        return np.zeros((0, config.k), np.int64), np.zeros((0, config.k))
    try:
        chunks = [
            _decode_part([p[at : at + _POSITIONS_AT_ONCE] for p in parts], config)
            for at in range(0, num_positions, _POSITIONS_AT_ONCE)
        ]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return np.concatenate([ids for ids, _ in chunks]), np.concatenate([values for _, values in chunks])


def _decode_part(parts: list[NDArray[Any]], config: Config | LegacyConfig) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if isinstance(config, LegacyConfig):
        packed, exact, coefficients = parts
        return decode_legacy(packed.astype(np.int64).view(np.uint64), exact, coefficients, config)
    values, ids = (_as_bytes(part) for part in parts)
    return decode_ids(ids, config), decode_values(values, config)


def _as_bytes(packed: NDArray[Any]) -> NDArray[np.uint8]:
    if packed.size and (packed.min() < 0 or packed.max() > 255):
        raise InputError(f"a packed byte is {packed.max() if packed.max() > 255 else packed.min()}, expected 0 to 255")
    return packed.astype(np.uint8)


def _rectangle(cell: Any, where: str) -> NDArray[Any]:
    """Positions of equal length as one array."""
    found = nested(cell, where)
    if found is None:
        return np.zeros((0, 0))
    values, counts_P = found
    if len(counts_P) and (counts_P != counts_P[0]).any():
        raise InputError(
            f"{where}: positions of {counts_P.min()} to {counts_P.max()} values; all must be as long as the config says"
        )
    return values.reshape(len(counts_P), int(counts_P[0]) if len(counts_P) else 0)


def _read_config(path: Path, named: str | None) -> tuple[Config | LegacyConfig, str]:
    where = Path(named) if named else (path if path.is_dir() else path.parent) / CONFIG_NAME
    try:
        with where.open("rb") if named else open_regular(where, where.parent) as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        hint = (
            "" if named else "; the data files do not hold it: name it, or the training config that repeats it, with --config"
        )
        raise InputError(f"{where}: DistillKit's compression config cannot be read: {error.strerror}{hint}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"{where}: not a compression config of DistillKit: longer than {MAX_CONFIG_BYTES:,} bytes")
    try:
        return parse_config(parse_yaml(text, where=str(where)), str(where)), str(where)
    except ConfigError as error:
        raise InputError(str(error)) from error


def _facts(config: Config | LegacyConfig, where: str, fit: FitQuality | None) -> dict[str, str]:
    if isinstance(config, LegacyConfig):
        curve = (
            f"degree {config.polynomial_degree}{' inverted' * config.invert_polynomial}{' with sqrt' * config.with_sqrt_term}"
        )
        return {"config": where, "entries": f"{config.k}, of them {config.exact_k} exact, the rest a polynomial of {curve}"}
    terms = ", ".join(map(str, config.polynomial_terms or ["none"]))
    facts = {
        "config": where,
        "entries": f"{config.k}, of them {config.exact_k} exact ({config.exact_dtype}); terms {terms} ({config.term_dtype})",
        "bytes": f"{config.value_bytes} for values and {config.id_bytes} for ids per position",
    }
    if fit is not None:
        facts["fit"] = (
            f"at best a smooth curve comes back within {fit.mean_error_nats:.2g} nats in the mean, "
            f"{fit.max_error_nats:.2g} at worst (condition number {fit.condition:.1e})"
        )
    return facts


def _fit_findings(fit: FitQuality | None) -> tuple[Finding, ...]:
    if fit is None or not fit.is_broken:
        return ()
    sentence = (
        "the fitted tails are broken: the design matrix of the polynomial terms has condition number "
        f"{fit.condition:.1e}, and DistillKit solves in float32, which carries {MAX_CONDITION:.1e}: the "
        "coefficients are noise. The exact entries can be kept; to capture again, use normalize_t: true"
    )
    return (Finding("broken_tails", "repairable", sentence, "--repair tails"),)
