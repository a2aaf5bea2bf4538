"""What a run's loss makes of the cache's entries: decided once, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import SelectionInfo
from kdcache.kernels.divergences import Divergence, ForwardKL, get_divergence
from kdcache.loss.selection_rules import targets_for


@dataclass(frozen=True, slots=True)
class EntryMeaning:
    """How a batch's entries go into the loss.

    Attributes:
        divergence: with its options.
        targets: as for `sparse_kd_loss`.
        log_z_column: of the batch's log_z_PC, the one of the loss's temperature; None at temperature 1.
        vocab_size: ids of the cache's vocabulary; None for all that a student knows.
    """

    divergence: Divergence
    targets: str = "exact"
    log_z_column: int | None = None
    vocab_size: int | None = None


PLAIN = EntryMeaning(ForwardKL())
"""Of exact entries and the loss's defaults."""


def entry_meaning(config: LossConfig, selection: SelectionInfo, vocab_size: int | None = None) -> EntryMeaning:
    """For a cache of this selection, of a teacher with `vocab_size` ids.

    Raises:
        LossError: an unknown divergence or option, or a loss that would be wrong for the selection; not where alpha is 0.
        ConfigError: a temperature for which the cache has no normalisers.
    """
    divergence = get_divergence(config.divergence, **config.divergence_options)
    if config.alpha == 0:
        return replace(PLAIN, vocab_size=vocab_size)
    targets = targets_for(selection.kind, divergence, tail=config.tail, temperature=config.temperature)
    if config.temperature == 1:
        return EntryMeaning(divergence, targets, vocab_size=vocab_size)
    if config.temperature not in selection.temperatures:
        stored = ", ".join(map(str, selection.temperatures)) or "none"
        raise ConfigError(
            f"loss.temperature is {config.temperature}, but beside 1.0 the cache has normalisers for {stored}: they cannot be "
            "made afterwards; capture with it among selection.temperatures"
        )
    return EntryMeaning(divergence, targets, selection.temperatures.index(config.temperature), vocab_size)
