"""The sidecar `output_projection`: what makes a teacher's logits of its states after the final norm, layer -1; NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError

OUTPUT_PROJECTION = "output_projection"
"""The sidecar's name."""


@dataclass(frozen=True, slots=True, eq=False)
class FinalNorm:
    """The norm between the last layer and the projection: (x - mean) / sqrt(mean square + eps) x (offset + weight) + bias.

    Attributes:
        weight_H: float32.
        bias_H: float32; None for none.
        eps: added to the mean square.
        offset: added to the weight: 1 in Gemma's models.
        subtracts_mean: whether it is a layer norm; otherwise a root mean square norm, which leaves the mean.
    """

    weight_H: NDArray[np.float32]
    bias_H: NDArray[np.float32] | None = None
    eps: float = 1e-6
    offset: float = 0.0
    subtracts_mean: bool = False

    def __call__(self, states: NDArray[np.floating]) -> NDArray[np.float64]:
        """States after the norm, from those before it, layer L; float64."""
        states = np.asarray(states, np.float64)
        if self.subtracts_mean:
            states = states - states.mean(axis=-1, keepdims=True)
        normed = states / np.sqrt(np.square(states).mean(axis=-1, keepdims=True) + self.eps)
        normed = normed * (self.offset + self.weight_H.astype(np.float64))
        return normed if self.bias_H is None else normed + self.bias_H


@dataclass(frozen=True, slots=True, eq=False)
class OutputProjection:
    """A teacher's output projection: logits = cap(scale x (weight h + bias)), where h is layer -1.

    Attributes:
        weight_VH: in the model's dtype; bfloat16 as its bits, uint16. V is the teacher's vocabulary, without padding.
        bias_V: the same; None for none.
        logit_scale: of Cohere's and Granite's models.
        softcap: then cap x tanh(logits / cap), as in Gemma's models; None for none.
        is_tied: whether the weight is that of the input embeddings.
        norm: the final norm; None where it is not one of those that `FinalNorm` can say.
    """

    weight_VH: NDArray[Any]
    bias_V: NDArray[Any] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    is_tied: bool = False
    norm: FinalNorm | None = None

    def logits(self, states: NDArray[np.floating]) -> NDArray[np.float32]:
        """(P, V) float32: the logits of states (P, H) after the final norm."""
        product = np.asarray(states, np.float32) @ as_float32(self.weight_VH).T
        if self.bias_V is not None:
            product += as_float32(self.bias_V)
        product *= np.float32(self.logit_scale)
        return product if self.softcap is None else np.tanh(product / self.softcap) * np.float32(self.softcap)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sidecar's tensors; those of `bfloat16_names` are bits."""
        found: dict[str, NDArray[Any]] = {
            "weight": self.weight_VH,
            "logit_scale": np.array([self.logit_scale], np.float64),
            "tied": np.array([self.is_tied], np.uint8),
        }
        if self.bias_V is not None:
            found["bias"] = self.bias_V
        if self.softcap is not None:
            found["softcap"] = np.array([self.softcap], np.float64)
        if self.norm is not None:
            norm = self.norm
            found |= {"norm_weight": norm.weight_H, "norm_eps": np.array([norm.eps]), "norm_offset": np.array([norm.offset])}
            found["norm_subtracts_mean"] = np.array([norm.subtracts_mean], np.uint8)
            if norm.bias_H is not None:
                found["norm_bias"] = norm.bias_H
        return found

    @property
    def bfloat16_names(self) -> tuple[str, ...]:
        """The tensors of `arrays` whose uint16 are the bits of bfloat16."""
        named = {"weight": self.weight_VH, "bias": self.bias_V}
        return tuple(name for name, array in named.items() if array is not None and array.dtype == np.uint16)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> OutputProjection:
        """Read it from the sidecar's tensors.

        Raises:
            CorruptCacheError: a tensor is missing or does not fit.
        """
        weight = arrays.get("weight")
        if weight is None or weight.ndim != 2:
            raise CorruptCacheError(f"sidecar {OUTPUT_PROJECTION!r} has no tensor 'weight' of two dimensions")
        size, width = weight.shape
        bias = _vector(arrays, "bias", size)
        norm, norm_weight = None, _vector(arrays, "norm_weight", width)
        if norm_weight is not None:
            norm_bias = _vector(arrays, "norm_bias", width)
            norm = FinalNorm(
                weight_H=as_float32(norm_weight),
                bias_H=None if norm_bias is None else as_float32(norm_bias),
                eps=_number(arrays, "norm_eps", 0.0),
                offset=_number(arrays, "norm_offset", 0.0),
                subtracts_mean=bool(_number(arrays, "norm_subtracts_mean", 0.0)),
            )
        softcap = _number(arrays, "softcap", 0.0)
        return cls(
            weight_VH=weight,
            bias_V=bias,
            logit_scale=_number(arrays, "logit_scale", 1.0),
            softcap=softcap or None,
            is_tied=bool(_number(arrays, "tied", 0.0)),
            norm=norm,
        )


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Convert exactly; uint16 are the bits of bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _vector(arrays: Mapping[str, NDArray[Any]], name: str, size: int) -> NDArray[Any] | None:
    found = arrays.get(name)
    if found is not None and found.shape != (size,):
        raise CorruptCacheError(f"sidecar {OUTPUT_PROJECTION!r}: {name!r} has the shape {found.shape}, expected ({size},)")
    return found


def _number(arrays: Mapping[str, NDArray[Any]], name: str, default: float) -> float:
    found = arrays.get(name)
    if found is None:
        return default
    if found.shape != (1,) or not np.isfinite(found).all():
        raise CorruptCacheError(f"sidecar {OUTPUT_PROJECTION!r}: {name!r} is {found!r}, expected one finite number")
    return float(found[0])
