"""DistillKit's compressed positions in NumPy: exact values, a fitted curve, quantised residuals, packed ids.

Written from what arcee-ai/DistillKit at a61c2e7 does (distillkit/compression/): a position of `compressed_logprobs`
holds, one after another, `exact_k` values, one coefficient per polynomial term, and for each residual bin a scale and
packed integers. The curve over ranks exact_k..k-1 is sum_i c_i t^i for whole i, and c sqrt(t), c exp(t) for the
special ones, with t = 0, 1, .. or, with `normalize_t`, evenly from 0 to 1. Ids are bits, most significant first.
`delta_encoding` stores differences.


"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError

FloatName = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

MAX_CONDITION = 2.0**24
"""DistillKit solves the least squares by a singular value decomposition in float32 with an absolute cut-off of 1e-5: beyond
this the least singular values are rounding noise, and are divided by all the same."""

MAX_K = 2**20
MAX_TERMS, MAX_POWER, MAX_CURVE_VALUES = 16, 64, 2**23
"""Of the fitted curve: DistillKit's own configs have up to five terms, of powers up to four; values are ranks times terms."""

MAX_UNPACKED_BITS = 2**24
"""At once, each of which takes eight bytes for a moment."""


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """Residuals of the next `num_elements` ranks, `element_bits` wide, times a scale."""

    scale_dtype: FloatName
    element_bits: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the scale and the packed elements."""
        return _BYTES[self.scale_dtype] + (self.num_elements * self.element_bits + 7) // 8


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """`compression_config.yaml`; the names are DistillKit's: d is the vocabulary, k the entries."""

    d: int
    k: int
    exact_k: int
    exact_dtype: FloatName = "float32"
    polynomial_terms: list[int | str] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: list[Bin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        ranks = f"d {self.d}, k {self.k}, exact_k {self.exact_k}"
        if not (1 <= self.k <= min(self.d, MAX_K) and 0 <= self.exact_k <= self.k and self.d <= 2**31):
            raise ValueError(f"expected 0 <= exact_k <= k <= d, got {ranks}")
        if any(isinstance(term, str) and term not in ("sqrt", "exp") for term in self.polynomial_terms or []):
            raise ValueError(f"polynomial_terms are whole numbers, sqrt and exp, got {self.polynomial_terms}")
        terms = self.polynomial_terms or []
        if len(terms) > MAX_TERMS or len(terms) * self.num_fitted > MAX_CURVE_VALUES:
            raise ValueError(f"{len(terms)} polynomial_terms for {self.num_fitted} ranks, expected at most {MAX_TERMS}")
        if any(isinstance(term, int) and abs(term) > MAX_POWER for term in terms):
            raise ValueError(f"polynomial_terms are powers from {-MAX_POWER} to {MAX_POWER}")
        if any(not 1 <= b.element_bits <= 32 or not 1 <= b.num_elements <= self.k for b in self.residual_bins):
            raise ValueError("residual_bins: expected 1 to 32 bits and 1 to k elements in each")
        if sum(b.num_elements for b in self.residual_bins) > self.num_fitted:
            raise ValueError("residual_bins hold more elements than there are fitted ranks")

    @property
    def num_fitted(self) -> int:
        """Ranks that are not stored exactly."""
        return self.k - self.exact_k

    @property
    def id_bits(self) -> int:
        """Width of an id. DistillKit takes the logarithm in float32."""
        return max(1, math.ceil(np.log2(np.float32(self.d))))

    @property
    def value_bytes(self) -> int:
        """Bytes of a position of `compressed_logprobs`."""
        terms = len(self.polynomial_terms or []) * _BYTES[self.term_dtype]
        return self.exact_k * _BYTES[self.exact_dtype] + terms + sum(b.num_bytes for b in self.residual_bins)

    @property
    def id_bytes(self) -> int:
        """Bytes of a position of `bytepacked_indices`."""
        return (self.k * self.id_bits + 7) // 8


class LegacyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The older layout: `packed_indices`, `exact_values`, `coeffs`."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        if not (1 <= self.k <= min(self.vocab_size, MAX_K) and 0 <= self.exact_k <= self.k and self.vocab_size <= 2**31):
            raise ValueError(f"expected 0 <= exact_k <= k <= vocab_size, got {self.exact_k}, {self.k}, {self.vocab_size}")
        if not 0 <= self.polynomial_degree <= MAX_TERMS:
            raise ValueError(f"polynomial_degree is {self.polynomial_degree}, expected 0 to {MAX_TERMS}")

    @property
    def id_bits(self) -> int:
        """Width of an id; 64 // id_bits of them are in each integer, the first in the lowest bits."""
        return max(1, math.ceil(np.log2(np.float32(self.vocab_size))))


def parse_config(fields: Any, where: str) -> Config | LegacyConfig:
    """The config that some YAML means; a training config's `logprob_compressor` section is found in it.

    Raises:
        InputError: it is none, or asks for something impossible.
    """
    for name in ("teacher", "logprob_compressor", "legacy_logit_compression"):
        if isinstance(fields, dict) and isinstance(fields.get(name), dict):
            fields = fields[name]
    kind = LegacyConfig if isinstance(fields, dict) and "polynomial_degree" in fields else Config
    try:
        return msgspec.convert(fields, kind)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise InputError(f"{where}: not a compression config of DistillKit: {error}") from error


def decode_values(packed: NDArray[np.uint8], config: Config) -> NDArray[np.float64]:
    """Decode (positions, bytes) to (P, K) logprobs, in float32 arithmetic as DistillKit's own decoder.

    Raises:
        InputError: positions of another length than the config's.
    """
    if packed.shape[1] != config.value_bytes:
        raise InputError(
            f"positions of compressed_logprobs are {packed.shape[1]} bytes, but the config says "
            f"{config.value_bytes}: it is not the config that made them"
        )
    cut = config.exact_k * _BYTES[config.exact_dtype]
    exact_PK = _floats(packed[:, :cut], config.exact_dtype)
    terms = config.polynomial_terms or []
    end = cut + len(terms) * _BYTES[config.term_dtype]
    fitted_PK = _residuals(packed[:, end:], config)
    if terms:
        basis = polynomial_basis(terms, config.num_fitted, normalize_t=config.normalize_t).astype(np.float32)
        coefficients = _floats(packed[:, cut:end], config.term_dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            fitted_PK = fitted_PK + (basis * coefficients[:, None, :]).sum(axis=-1, dtype=np.float32)
    values_PK = np.concatenate([exact_PK, fitted_PK], axis=1, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.cumsum(values_PK, axis=1, dtype=np.float32) if config.delta_encoding else values_PK).astype(np.float64)


def decode_ids(packed: NDArray[np.uint8], config: Config) -> NDArray[np.int64]:
    """Decode (positions, bytes) to (P, K) ids; raises InputError for another number of bytes than the config's."""
    if packed.shape[1] != config.id_bytes:
        raise InputError(
            f"positions of bytepacked_indices are {packed.shape[1]} bytes, but {config.k} ids of a vocabulary "
            f"of {config.d} take {config.id_bytes}: the config's d or k is not the one that made them"
        )
    return _unpack(packed, config.id_bits, config.k)


def decode_legacy(
    packed: NDArray[np.uint64], exact_PK: NDArray[np.floating], coefficients: NDArray[np.floating], config: LegacyConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Decode the older layout to (P, K) ids and values, from (positions, integers).

    Raises:
        InputError: positions of another length than the config's.
    """
    per_integer = 64 // config.id_bits
    num_terms = config.polynomial_degree + 1 + config.with_sqrt_term if config.exact_k < config.k else 0
    expected = (-(-config.k // per_integer), config.exact_k, num_terms)
    found = (packed.shape[1], exact_PK.shape[1], coefficients.shape[1])
    if found != expected:
        raise InputError(
            f"positions hold {found[0]} packed integers, {found[1]} exact values and {found[2]} coefficients, "
            f"but the config says {expected[0]}, {expected[1]} and {expected[2]}"
        )
    shifts = np.arange(per_integer, dtype=np.uint64) * np.uint64(config.id_bits)
    ids_PK = (packed[:, :, None] >> shifts) & np.uint64(2**config.id_bits - 1)
    t_K = np.arange(1, config.k - config.exact_k + 1, dtype=np.float64)
    sign = -1 if config.invert_polynomial else 1
    with np.errstate(over="ignore", invalid="ignore"):
        columns = [t_K ** (sign * power) for power in range(config.polynomial_degree + 1)]
        basis = np.stack([*columns, np.sqrt(t_K)][: max(num_terms, 1)], axis=-1)[:, :num_terms]
        fitted_PK = coefficients.astype(np.float64) @ basis.T
    values_PK = np.concatenate([exact_PK.astype(np.float64), fitted_PK], axis=1)
    return ids_PK.reshape(len(packed), -1)[:, : config.k].astype(np.int64), values_PK


def polynomial_basis(terms: list[int | str], num_ranks: int, *, normalize_t: bool) -> NDArray[np.float64]:
    """Return (ranks, terms): the terms at every fitted rank."""
    t_K = np.linspace(0, 1, num_ranks) if normalize_t else np.arange(num_ranks, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    with np.errstate(over="ignore", divide="ignore"):
        return np.stack([special[term](t_K) if isinstance(term, str) else t_K**term for term in terms], axis=-1)


@dataclass(frozen=True)
class FitQuality:
    """What a config can do at best, and whether DistillKit's arithmetic can do it.

    Attributes:
        mean_error_nats, max_error_nats: over the fitted ranks of p(r) ~ (r+1)^-1.65, fitted in float64.
        condition: of the design matrix: its greatest by its least singular value.
    """

    mean_error_nats: float
    max_error_nats: float
    condition: float

    @property
    def is_broken(self) -> bool:
        """Whether float32 cannot fit it: rounding of the greatest singular value is as large as the least one."""
        return not self.condition < MAX_CONDITION


def fit_quality(config: Config) -> FitQuality | None:
    """Judge the terms of a config; None where nothing is fitted."""
    terms = config.polynomial_terms
    if not terms or not config.num_fitted:
        return None
    basis = polynomial_basis(terms, config.num_fitted, normalize_t=config.normalize_t)
    true_K = -1.65 * np.log(np.arange(config.exact_k, config.k) + 1.0) - math.log(2.3)
    if not np.isfinite(basis).all():
        return FitQuality(math.inf, math.inf, math.inf)
    errors_K = np.abs(basis @ np.linalg.lstsq(basis, true_K, rcond=None)[0] - true_K)
    return FitQuality(float(errors_K.mean()), float(errors_K.max()), float(np.linalg.cond(basis)))


def _residuals(packed: NDArray[np.uint8], config: Config) -> NDArray[np.float32]:
    residual_PK = np.zeros((len(packed), config.num_fitted), np.float32)
    byte = rank = 0
    for group in config.residual_bins:
        start = byte + _BYTES[group.scale_dtype]
        scale_P1 = _floats(packed[:, byte:start], group.scale_dtype)
        steps_PK = _unpack(packed[:, start : byte + group.num_bytes], group.element_bits, group.num_elements)
        signed_PK = steps_PK * 2 - 1 if group.element_bits == 1 else steps_PK - (1 << (group.element_bits - 1))
        residual_PK[:, rank : rank + group.num_elements] = signed_PK.astype(np.float32) * scale_P1
        byte, rank = byte + group.num_bytes, rank + group.num_elements
    return residual_PK


def _unpack(packed: NDArray[np.uint8], width: int, num_values: int) -> NDArray[np.int64]:
    weights = np.int64(1) << np.arange(width - 1, -1, -1, dtype=np.int64)
    steps = np.empty((len(packed), num_values), np.int64)
    at_once = max(1, MAX_UNPACKED_BITS // (num_values * width))
    for at in range(0, len(packed), at_once):
        part = packed[at : at + at_once]
        bits = np.unpackbits(part, axis=1, count=num_values * width, bitorder="big").reshape(len(part), num_values, width)
        steps[at : at + at_once] = bits.astype(np.int64) @ weights
    return steps


def _floats(packed: NDArray[np.uint8], name: FloatName) -> NDArray[np.float32]:
    data = np.ascontiguousarray(packed)
    if name == "bfloat16":  # the upper half of a float32
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        return data.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[name]).astype(np.float32)
