"""What the loader asks of a reader: the part of `kdcache.store.reader.CacheReader` that it uses.

Shape letters: S sequences of the cache.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import Manifest
from kdcache.format.record import SequenceRecord


class Reader(Protocol):
    """Random access to the records of one snapshot of a cache; `reader[i]` may be called from several threads at once."""

    @property
    def manifest(self) -> Manifest:
        """What describes the snapshot."""
        ...

    @property
    def snapshot(self) -> str:
        """The digest of the manifest: two readers with equal snapshots hold equal records in equal order."""
        ...

    @property
    def num_tokens_S(self) -> NDArray[np.uint32]:
        """(S,) tokens of each sequence, from the index: no record is touched."""
        ...

    @property
    def num_positions_S(self) -> NDArray[np.uint32]:
        """(S,) supervised positions of each sequence."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SequenceRecord: ...
