"""What a writer refuses before it writes: directories that are not its cache, records that no reader could read."""

from __future__ import annotations

from pathlib import Path

from kdcache.codec.base import ids_fit
from kdcache.errors import (
    CaptureError,
    ConfigError,
    FormatError,
    KdcacheError,
    MismatchError,
    StorageError,
    UnsupportedVersionError,
)
from kdcache.format import paths
from kdcache.format.manifest import FORMAT_VERSION, Manifest
from kdcache.format.record import FINISHES, ROLES, Distributions, SequenceRecord
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.location import Location

MAX_ENTRIES = 2**16 - 1
"""Entries at one position, where the selection does not fix their number."""

MAX_SEQUENCE_ENTRIES = 2**30
"""Entries of one sequence: lists in a record batch have 31-bit offsets."""


def refuse_foreign_directory(root: Location) -> None:
    """Raise MismatchError unless a cache is there or may be made there: a capture asks before it loads a model.

    Raises:
        ConfigError: a store in which no cache can be written. StorageError: the disk refuses.
    """
    if not isinstance(root, Path) and not root.can_create:
        raise ConfigError(
            f"{root}: a cache can be read from such a store but not written into it, as it cannot put an object "
            "only where there is none; write to a disk, s3:// or gs://, and copy the cache there when it is complete"
        )
    try:
        _refuse_what_is_there(root)
    except OSError as error:
        if isinstance(error, KdcacheError):
            raise
        raise StorageError(f"{str(root)!r} cannot be looked at: {error.strerror or error}") from error


def _refuse_what_is_there(root: Location) -> None:
    if root.exists() and not root.is_dir():
        raise MismatchError(f"output {str(root)!r} is a file; expected a directory for the cache")
    if not root.is_dir() or chain.manifest_numbers(root):
        return
    foreign = sorted(p.name for p in root.iterdir() if p.name not in paths.DIRECTORIES) + _foreign_files(root)
    # Looked at again: another writer may have started the cache in between, and nothing of it is there before its manifest.
    if foreign and not chain.manifest_numbers(root):
        raise MismatchError(
            f"output directory {str(root)!r} is not a cache and not empty (it holds {foreign[0]!r}); "
            "choose an empty or new directory"
        )


def refuse_other_capture(root: Location, theirs: Manifest, ours: Manifest) -> None:
    """Raise MismatchError, naming what differs, unless the cache that is there is the one that is to be written."""
    if theirs.format_version > FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{str(root)!r} has format version {theirs.format_version[0]}.{theirs.format_version[1]}, this kdcache writes "
            f"{FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}: it can read the cache but not go on with it; upgrade kdcache"
        )
    differences = theirs.identity.differences(ours.identity)
    if theirs.plan != ours.plan:
        differences.append(
            f"plan: {theirs.plan.num_units} units {theirs.plan.fingerprint[:12]} != {ours.plan.num_units} units "
            f"{ours.plan.fingerprint[:12]}"
        )
    if differences:
        raise MismatchError(
            f"{str(root)!r} holds another capture (there != asked for): {'; '.join(differences)}; "
            "choose another destination (`out`), or repeat the config that made it to resume"
        )


def check_record(record: SequenceRecord, *, vocab_size: int, fixed_entries: int | None) -> None:
    """Raise CaptureError unless sequence and distributions fit together and into the format.

    Whether the distributions are sound is the teacher's contract (`check_distributions`), and costs more.
    """
    problem = _sequence_problem(record, vocab_size) or _entries_problem(record.distributions, fixed_entries, vocab_size)
    if problem is None:
        try:
            record.distributions.target_logprobs(record.sequence.target_ids_P)
        except FormatError as error:
            problem = str(error)
    if problem is not None:
        raise CaptureError(f"{record.sequence.source}: {problem}; the record cannot be stored")


def _foreign_files(root: Location) -> list[str]:
    """Files where a cache's would be, with no manifest: a fold would sweep them as left over."""
    found = [path for name in paths.DIRECTORIES if (root / name).exists() for path in _listing(root / name)]
    foreign = [path for path in found if path.parent.name != paths.TMP or not fs.is_temp_name(path.name)]
    return sorted(str(path).removeprefix(f"{root}/") for path in foreign)


def _listing(directory: Location) -> list[Location]:
    return list(directory.iterdir()) if directory.is_dir() else [directory]


def _sequence_problem(record: SequenceRecord, vocab_size: int) -> str | None:
    s = record.sequence
    if not s.num_tokens or len(s.supervised_N) != s.num_tokens or len(s.roles_N) != s.num_tokens:
        return f"{s.num_tokens} tokens with {len(s.supervised_N)} flags and {len(s.roles_N)} roles"
    if not ids_fit(s.input_ids_N, vocab_size):
        return f"a token id of the text is outside the teacher's vocabulary of {vocab_size}"
    if not ids_fit(s.turn_starts, s.num_tokens) or int(s.roles_N.max()) >= len(ROLES):
        return "a turn starts outside the sequence, or a role is unknown"
    if s.finish not in FINISHES:
        return f"it ended by {s.finish!r}, known are {', '.join(FINISHES[1:])}"
    if record.distributions.num_positions != int(s.supervised_N.sum()):
        return f"distributions for {record.distributions.num_positions} of {int(s.supervised_N.sum())} supervised positions"
    return None


def _entries_problem(d: Distributions, fixed_entries: int | None, vocab_size: int) -> str | None:
    counts_P = d.num_entries_P
    if d.offsets_P1[0] != 0 or (counts_P < 0).any():
        return "offsets that do not rise from 0"
    if not d.offsets_P1[-1] == len(d.token_ids_E) == len(d.logprobs_E) or len(d.tail_mass_P) != d.num_positions:
        lengths = f"{len(d.token_ids_E)} ids, {len(d.logprobs_E)} logprobs, {len(d.tail_mass_P)} tails"
        return f"{d.offsets_P1[-1]} entries at {d.num_positions} positions with {lengths}"
    most = int(counts_P.max(initial=0))
    if d.num_entries > MAX_SEQUENCE_ENTRIES:
        return f"{d.num_entries} entries, at most {MAX_SEQUENCE_ENTRIES} fit"
    if fixed_entries is not None and most > fixed_entries:
        return f"a position has {most} entries, but the selection keeps {fixed_entries}"
    if most > MAX_ENTRIES and not (fixed_entries is not None and (counts_P == fixed_entries).all()):
        return f"a position has {most} entries, at most {MAX_ENTRIES} fit where their number varies"
    if d.num_exact_P is not None and (len(d.num_exact_P) != d.num_positions or (d.num_exact_P > counts_P).any()):
        return "numbers of exact entries that do not fit the entries"
    if any(scalars is not None and len(scalars) != d.num_positions for scalars in (d.log_z_PT, d.entropy_P)):
        return f"log_z or entropy of another number of positions than {d.num_positions}"
    if not ids_fit(d.token_ids_E, vocab_size):
        return f"a token id of a support is outside the teacher's vocabulary of {vocab_size}"
    return None
