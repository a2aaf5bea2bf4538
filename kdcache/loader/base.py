"""What the loader asks of a reader: the part of `kdcache.store.reader.CacheReader` that it uses."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import Manifest
from kdcache.format.record import SequenceRecord
from kdcache.store.records.batch import EncodedRecord
from kdcache.store.records.mapped import MappedSequences
from kdcache.store.remote.look_ahead import LookAhead


class Reader(Protocol):
    """Random access to the records of one snapshot of a cache. Safe to use from several threads.

    Every reader has all members; what it cannot do is None there, and the loader takes the slower way.
    """

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

    @property
    def groups_S(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
        """(S, 16) the group of answers that each sequence belongs to, zeros for none, and (S,) codes of PREFERENCES, from the
        index; None in a cache without groups."""
        ...

    @property
    def ahead(self) -> LookAhead | None:
        """Fetches what is read next from an object store; None for a cache on a disk."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SequenceRecord: ...

    def encoded(self, index: int, /) -> SequenceRecord | EncodedRecord:
        """Read a sequence, without decoding its entries where that is possible."""
        ...

    def sidecar(self, name: str, /) -> dict[str, NDArray[Any]]:
        """The arrays of one of the cache's sidecars, bfloat16 as its bits; ConfigError where it has none of this name."""
        ...

    def mapped(self, indices: NDArray[np.int64], /) -> MappedSequences | None:
        """Sequences for a compiled loop to read; None where they have to be read one by one."""
        ...

    def close(self) -> None:
        """Release open files; the reader can still be used, and opens them again."""
        ...
