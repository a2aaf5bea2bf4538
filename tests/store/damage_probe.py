"""Run by test_damage.py in a process of its own, so that a crash would be seen: damages a file in many ways, one at a time.

Standard input: JSON with `cache` (path), `name` (file in it), `flips` (bit numbers) and `cuts` (lengths). Standard output: for
each way in order [what came of reading every row, what came of verify], as JSON: "refused", "equal", or what went wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from kdcache.errors import KdcacheError
from kdcache.format.record import SequenceRecord
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache


def meaning(record: SequenceRecord) -> list[bytes | str]:
    """Every value of a record; NaN and the sign of zero included."""
    parts = (record.sequence, record.distributions)
    values = [getattr(part, name) for part in parts for name in part.__dataclass_fields__]
    return [value.tobytes() if isinstance(value, np.ndarray) else value for value in values]


def read_all(cache: Path) -> list[list[bytes | str]]:
    with open_reader(cache) as reader:
        return [meaning(reader[i]) for i in range(len(reader))]


def outcome_of_reading(cache: Path, expected: list[list[bytes | str]]) -> str:
    try:
        return "equal" if read_all(cache) == expected else "CHANGED VALUES"
    except KdcacheError as error:
        return "refused" if str(error) else "NO MESSAGE"
    except Exception as error:
        return f"FOREIGN ERROR {type(error).__name__}: {error}"


def outcome_of_verify(cache: Path) -> str:
    try:
        return "refused" if verify_cache(cache).problems else "equal"
    except KdcacheError:
        return "refused"
    except Exception as error:
        return f"FOREIGN ERROR {type(error).__name__}: {error}"


def main() -> None:
    task = json.load(sys.stdin)
    cache, path = Path(task["cache"]), Path(task["cache"]) / task["name"]
    data, expected = path.read_bytes(), read_all(Path(task["cache"]))
    outcomes = []
    for bit in task["flips"]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        print(f"flip {bit}", file=sys.stderr, flush=True)
        outcomes.append([outcome_of_reading(cache, expected), outcome_of_verify(cache)])
    for length in task["cuts"]:
        path.write_bytes(data[:length])
        print(f"cut {length}", file=sys.stderr, flush=True)
        outcomes.append([outcome_of_reading(cache, expected), outcome_of_verify(cache)])
    path.write_bytes(data)
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
