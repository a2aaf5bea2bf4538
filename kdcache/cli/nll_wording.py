"""What `info` and `verify` print about a cache's NLL, and about whether its distributions belong to their tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kdcache.format.manifest_checks import MAX_COUNT

if TYPE_CHECKING:
    from kdcache.format.manifest import Manifest

FEW = 0.01
"""Up to this share of targets without a logprob, the NLL is evidence for the whole cache."""


def left_out(manifest: Manifest) -> str:
    """How many targets the NLL leaves out, and why; empty if none."""
    num_targets, num_left_out = manifest.total("num_targets"), manifest.total("num_impossible_targets")
    if not num_left_out:
        return ""
    why = "are outside their support" if conversion(manifest) is not None else "have probability 0 or are outside their support"
    return (
        f"{num_left_out:,} of {num_targets:,} targets {why} and have no logprob: they are left out, and the text is less "
        "likely than this"
    )


def conversion(manifest: Manifest) -> dict[str, Any] | None:
    """The notes of `kdcache convert`; None for a captured cache."""
    return manifest.notes if "converted_from" in manifest.notes else None


def alignment(manifest: Manifest) -> dict[str, str]:
    """A line on whether distributions were proven to belong to their tokens; none if a capture's NLL proves it."""
    notes = conversion(manifest)
    if notes is None:
        num_targets, num_left_out = manifest.total("num_targets"), manifest.total("num_impossible_targets")
        if num_left_out <= FEW * num_targets:
            return {}
        shown = (
            f"the NLL shows it for {num_targets - num_left_out:,} of {num_targets:,} targets, and says nothing about the others"
        )
        return {"alignment": f"{shown}; `kdcache verify --deep` compares all positions"}
    proof = notes.get("alignment")
    return {"alignment": f"{_proof(proof if isinstance(proof, dict) else {})} (from {notes['converted_from']})"}


def _proof(proof: dict[str, Any]) -> str:
    by = proof.get("proven_by")
    if by == "teacher":
        return (
            f"proven at conversion by the teacher, asked about {_count(proof.get('num_sequences', 0))} sequences: KL "
            f"{_digits(proof.get('kl_nats'))} nats"
        )
    if by == "text":
        return (
            f"proven at conversion from the text: {_percent(proof.get('hits_found'))} of the targets are in their support, "
            f"masses say {_percent(proof.get('hits_claimed'))}, chance gives {_percent(proof.get('hits_by_chance'))}"
        )
    reason = proof.get("reason", "it was converted before this was recorded")
    return (
        f"NOT proven: {reason}; whether distributions belong to their tokens is taken on trust. "
        "`kdcache verify --deep --teacher MODEL` tells"
    )


# A manifest's notes may hold any JSON value, including whole numbers beyond a float's range.


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) <= MAX_COUNT else "-"


def _digits(value: Any) -> str:
    return f"{value:.2g}" if _is_finite(value) else "-"


def _percent(value: Any) -> str:
    return f"{value:.1%}" if _is_finite(value) else "-"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
