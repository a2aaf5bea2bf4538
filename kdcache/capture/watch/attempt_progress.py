"""What one attempt at a unit reports while it runs; when the attempt fails, its progress is taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kdcache.capture.plan import Unit
from kdcache.capture.watch.heartbeat import Heartbeat
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.format.record import SequenceRecord, TokenSequence


class AttemptProgress:
    """Beats the heart and moves the progress bar as a teacher answers.

    Attributes:
        heart: the watch over this capture.
    """

    def __init__(self, progress: CaptureProgress, heart: Heartbeat) -> None:
        self.heart = heart
        self._progress = progress
        self._doing = ""
        self._num_tokens = 0

    def expect(self, unit: Unit, num_tokens: int) -> None:
        """Say how many tokens the unit has, or may have at most."""
        self._progress.start_unit(unit, num_tokens)

    def begin(self, doing: str) -> None:
        """Start an attempt; `doing` says what it does, for the watch's message."""
        self._doing, self._num_tokens = doing, 0
        self.heart.beat(doing)

    def begin_writing(self) -> None:
        """The teacher starts to write answers; `advance` follows their tokens."""
        self.heart.beat(f"{self._doing}: writing answers")

    def end_writing(self, sequences: Sequence[TokenSequence]) -> None:
        """The answers are written. One that was cut at a stop string has lost tokens that were counted."""
        self.advance(sum(int(sequence.supervised_N.sum()) for sequence in sequences) - self._num_tokens)
        self.heart.beat(self._doing)

    def advance(self, num_tokens: int) -> None:
        """The teacher has read or written this many more tokens."""
        self.heart.beat()
        self._num_tokens += num_tokens
        self._progress.advance(num_tokens)

    def counted(self, records: Iterable[SequenceRecord]) -> Iterator[SequenceRecord]:
        """Pass records on as they are answered, and count each after it is used."""
        is_written = self._num_tokens > 0
        for record in records:
            self.heart.beat()
            yield record
            # Of a sequence that the teacher wrote itself only the prompt is new.
            self.advance(record.sequence.num_tokens - (record.distributions.num_positions if is_written else 0))
        self.heart.beat(f"{self._doing}: writing")

    def take_back(self) -> None:
        """The attempt's answers are void: the bar goes back to where it began."""
        if self._num_tokens:
            self._progress.advance(-self._num_tokens)
        self._num_tokens = 0
