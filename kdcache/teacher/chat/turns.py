"""Which part of a rendered chat belongs to whom, proven for each chat. Characters only; no tokenizer, no template engine.

A chat template is a program that makes one text of all messages. Its output says of each character which message it comes from
(`marked_text`), so nobody's words have to be searched for. Two borders remain, both in the template's own text:

- *Where the assistant starts:* after what the template writes to prompt it. The chat up to there is rendered with the
  generation prompt. What then follows the last character of the previous messages must follow the same character in the whole
  text. A template that has no generation prompt, or always writes one, is shown a made-up answer: what precedes it is the
  header.
- *Where its turn ends:* the chat up to and including its message is rendered. What then follows its last character must follow
  it in the whole text; the turn ends with the last special token in it. If the template ends earlier turns differently from the
  last one, the special token after the message is taken, if it follows others' messages, too, and opens no turn.

Nothing depends on the beginning of a chat being rendered the same when more follows: some templates leave out earlier thoughts,
or fold the system prompt into the last user's turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.inputs.chat import Message, texts_of
from kdcache.teacher.chat.marked_text import runs
from kdcache.teacher.chat.rendered import ChatSpans, Render, Rendered, Whole

ASKED = "x"
"""The made-up answer that shows the header of a template without a generation prompt."""


def find_spans(messages: Sequence[Message], whole: Whole, render: Render) -> ChatSpans:
    """Locate every message in the rendered text.

    A message that cannot be rendered without the next one (templates that fold the system prompt into the user's turn, or that
    refuse a chat without a user) shares the next one's turn.

    Args:
        messages: the whole chat.
        whole: what `render(messages, False)` gives.
        render: gives the text of a beginning of the chat.

    Raises:
        InputError: the start or the end of an assistant's message cannot be proven; names it.
    """
    finder = _Finder(messages, whole, render)
    spans = ChatSpans()
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            finder.add_assistant(index, spans)
        else:
            spans.contents += [(index, start, end) for start, end in runs(whole.rendered.message_indices == index)]
            finder.add_turn(index, spans)
    spans.contents.sort(key=lambda content: content[1])
    spans.turn_starts = sorted(set(spans.turn_starts))
    return spans


class _Finder:
    """What is known of one chat while its messages are located."""

    def __init__(self, messages: Sequence[Message], whole: Whole, render: Render) -> None:
        self._messages, self._whole, self._render = messages, whole, render
        self._rendered, self._text = whole.rendered, whole.rendered.text

    def add_turn(self, index: int, spans: ChatSpans) -> None:
        """Find where the turn after a message of somebody else starts: where the text of the chat up to it ends."""
        if index + 1 == len(self._messages):
            return
        given = self._render(self._messages[: index + 1], False)
        if given is None and self._messages[index + 1]["role"] == "assistant":
            # The assistant's header then counts to this turn; it is the template's own text in either.
            given = self._render(self._messages[: index + 1], True)
        if given is None or not (given.message_indices == index).any():
            return
        end = self._follow(given)
        if end is None:
            own = np.flatnonzero(self._rendered.message_indices == index)
            end = self._after_token(index, int(own[-1]) + 1)[0] if len(own) else None
        if end is not None and end < len(self._text):
            spans.turn_starts.append(end)

    def add_assistant(self, index: int, spans: ChatSpans) -> None:
        """Find the spans of one message of the assistant: proven, or else what the template's tags mark around its words."""
        try:
            self._add_proven(index, spans)
        except InputError:
            tagged = self._tagged_words(index)
            says_nothing = not any(map(str.strip, texts_of({**self._messages[index], "role": ""})))
            if not tagged and not says_nothing:
                raise
            spans.empty += [index] * says_nothing
            spans.contents += tagged
            spans.learnt += tagged

    def _add_proven(self, index: int, spans: ChatSpans) -> None:
        own = np.flatnonzero(self._rendered.message_indices == index)
        start = self._start(index)
        first = int(own[0]) if len(own) else start
        if start is None or first is None or start > first:
            raise InputError(_unproven(index, "starts"))
        last = self._last_written(own) if len(own) else start
        whole_end, end = self._end(index, start, last)
        if not start <= last <= end or not np.isin(self._rendered.message_indices[start:end], (-1, index)).all():
            raise InputError(_unproven(index, "is: it contains what others wrote"))
        spans.contents.append((index, start, end))
        if self._is_lost(index, start, end, has_words=len(own) > 0):
            spans.lost.append(index)
        else:
            spans.learnt += self._tagged(index, start, end) if self._whole.has_tags else [(index, start, end)]
            spans.endless += [index] * (not any(special[1] == end for special in self._whole.special))
        if whole_end < len(self._text) and index + 1 < len(self._messages):
            spans.turn_starts.append(whole_end)

    def _last_written(self, own: NDArray[np.intp]) -> int:
        """Where the last character of a message that appears for the first time ends.

        Some templates write the name of a call again, before its result.
        """
        origins = self._rendered.origins
        offset = int(own[np.unique(origins[own], return_index=True)[1].max()])
        other = np.flatnonzero(origins[offset:] != origins[offset])
        return offset + int(other[0]) if len(other) else len(origins)

    def _follow(self, given: Rendered, end: int | None = None) -> int | None:
        """Where given.text[:end] ends in the whole text: found by the last character that somebody wrote, and what follows."""
        words = given.end_of_words() if end is None else self._end_of_words_before(given, end)
        rest = given.text[words:end]
        starts = [0]
        if words:
            # One character is several where it is escaped, and appears several times where the template repeats it.
            starts = [stop for _, stop in runs(self._rendered.origins == given.origins[words - 1])]
        if len(starts) > 1 and not rest.strip():
            return None
        stops = [start + len(rest) for start in starts if self._text.startswith(rest, start)]
        stops = [stop for stop in stops if (self._rendered.message_indices[stop - len(rest) : stop] < 0).all()]
        return stops[0] if len(stops) == 1 else None

    @staticmethod
    def _end_of_words_before(given: Rendered, end: int) -> int:
        own = np.flatnonzero(given.message_indices[:end] >= 0)
        return int(own[-1]) + 1 if len(own) else 0

    def _start(self, index: int) -> int | None:
        before = self._messages[:index]
        opened, closed = self._render(before, True), self._render(before, False)
        if opened is None or (closed is not None and closed.text == opened.text):
            return self._start_by_example(index)
        start = self._follow(opened)
        if start is not None or closed is None:
            return start
        start = self._start_by_shorter_header(index, opened, closed)
        return self._start_by_example(index) if start is None else start

    def _start_by_example(self, index: int) -> int | None:
        """Where the assistant starts, if the template always opens its turn, or never does."""
        asked = self._render([*self._messages[:index], {"role": "assistant", "content": ASKED}], False)
        words = [] if asked is None else np.flatnonzero(asked.message_indices == index)
        if asked is None or not len(words):
            return None
        end = int(words[0])
        start = self._follow(asked, end)
        # There may be no space before a call.
        before = self._end_of_words_before(asked, end)
        return start if start is not None else self._follow(asked, max(before, len(asked.text[:end].rstrip())))

    def _start_by_shorter_header(self, index: int, opened: Rendered, closed: Rendered) -> int | None:
        """Where the assistant starts, if the generation prompt opens a thought that the whole text does not have.

        It is after the beginning of the header that both have, up to the end of a line or tag. It
        is looked for right before the words, and, for calls, where the text before the turn ends.
        """
        own = np.flatnonzero(self._rendered.message_indices == index)
        header = opened.text[len(closed.text) :] if opened.text.startswith(closed.text) else ""
        if not len(own) or not header:
            return None
        first = int(own[0])
        before = self._end_of_words_before(self._rendered, first)
        lengths = [n for n in range(len(header) - 1, 0, -1) if header[n - 1].isspace() or header[n - 1] in ">]|:"]
        lengths = [length for length in lengths if sum(map(str.isalpha, header[:length])) >= 3]
        if any(self._text[before:first].endswith(header[:length]) for length in lengths):
            return first
        begin = self._follow(closed)
        stops = [] if begin is None else [begin + n for n in lengths if self._text[begin:first].startswith(header[:n])]
        stop = next((stop for stop in stops if not any(a < stop < b for a, b in self._whole.special)), None)
        return stop if stop is not None and self._is_assistants(index, header[: stop - (begin or 0)]) else None

    def _is_assistants(self, index: int, header: str) -> bool:
        """Whether nobody else's turn begins with this header."""
        for role in ("user", "tool", "system"):
            other = self._render([*self._messages[:index], {"role": role, "content": ASKED}], False)
            if other is not None and (other.message_indices == index).any():
                words = int(np.flatnonzero(other.message_indices == index)[0])
                return header not in other.text[self._end_of_words_before(other, words) : words]
        return False

    def _end(self, index: int, start: int, last: int) -> tuple[int, int]:
        """Where the turn ends, and where the assistant's part of it ends.

        The part excludes what the template writes after the token that ends the turn, which the model never produces.
        """
        through = self._messages[: index + 1]
        ended, opened = self._render(through, False), self._render(through, True)
        end = None if ended is None else self._follow(ended)
        if end is None or end < last:
            return self._end_by_token(index, last)
        special = [span for span in self._whole.special if last <= span[0] < end]
        if ended is not None and opened is not None and opened.text == ended.text:
            end = self._end_before_header(index, start, end, special)
            special = [span for span in special if span[0] < end]
        return end, self._end_of_tokens(index, special, end)

    def _end_of_tokens(self, index: int, special: Sequence[tuple[int, int]], end: int) -> int:
        """The end of the special tokens that end the text, up to the first one that ends others' turns or a text.

        What follows that one is the template's. `end` if no special tokens end the text.
        """
        for i, (start, _) in enumerate(special):
            rest = self._text[start:end]
            for span in special[i:]:
                rest = rest.replace(self._whole.token(span), "", 1)
            if not rest.strip():
                known = (span for span in special[i:] if self._ends_turns(index, span))
                return next(known, special[-1])[1]
        return end

    def _ends_turns(self, index: int, span: tuple[int, int]) -> bool:
        return span in self._whole.ends or self._ends_others(index, self._whole.token(span))

    def _end_before_header(self, index: int, start: int, end: int, special: Sequence[tuple[int, int]]) -> int:
        """The end, if the template writes the same with and without a generation prompt: it may have opened another turn."""
        last = max(start, self._end_of_words_before(self._rendered, end))
        rest = self._text[last:end]
        if not special and not rest.strip():
            return end
        after = self._whole.next_special(last)
        if special and not self._text[special[-1][1] : end].strip():
            is_alone = len(special) == 1 and special[0] == after and not self._is_opener(special[0], start)
            if is_alone or special[-1] in self._whole.ends:
                return end
        if after is not None and after in self._whole.ends:
            return after[1]
        why = "the template writes the same with a generation prompt and without, so what follows may open another turn"
        raise InputError(_unproven(index, f"ends: {why}"))

    def _is_opener(self, span: tuple[int, int], start: int) -> bool:
        """Whether the assistant's turn was opened with this special token alone."""
        before = [other for other in self._whole.special if other[1] <= start][-1:]
        same = bool(before) and self._whole.token(before[0]) == self._whole.token(span)
        return same and not self._text[before[0][1] : start].strip()

    def _end_by_token(self, index: int, last: int) -> tuple[int, int]:
        whole_end, end = self._after_token(index, last)
        if whole_end is None or end is None:
            raise InputError(_unproven(index, "ends"))
        return whole_end, end

    def _after_token(self, index: int, last: int) -> tuple[int, int] | tuple[None, None]:
        """Where the following special token ends, with and without the line break after it; None if it may not be an end."""
        after = self._whole.next_special(last)
        if after is None or not self._ends_turns(index, after):
            return None, None
        rest = self._text[after[1] :]
        return after[1] + len(rest) - len(rest.lstrip("\n")), after[1]

    def _ends_others(self, index: int, token: str) -> bool:
        """Whether a special token also follows the words of somebody else, and opens no turn of the assistant."""
        opened, closed = self._render(self._messages[:index], True), self._render(self._messages[:index], False)
        if opened is None or closed is None or token in _beyond(opened.text, closed.text):
            return False
        for other, message in enumerate(self._messages):
            own = np.flatnonzero(self._rendered.message_indices == other)
            follows = self._whole.next_special(int(own[-1]) + 1) if len(own) and message["role"] != "assistant" else None
            if other != index and follows is not None and self._whole.token(follows) == token:
                return True
        return False

    def _is_lost(self, index: int, start: int, end: int, *, has_words: bool) -> bool:
        """Whether the template leaves out all that a message says, or its calls, so that only its end would be learnt.

        Raises:
            InputError: the text shows none of it and has something else instead, which may stand for it.
        """
        message = self._messages[index]
        if index in self._whole.lost_calls:
            return True
        if has_words or not any(map(str.strip, texts_of({**message, "role": ""}))):
            return False
        rest = self._text[start:end]
        for span in self._whole.special:
            rest = rest.replace(self._whole.token(span), "")
        if rest.strip():
            raise InputError(_unproven(index, "is: the template writes something else instead"))
        return True

    def _tagged(self, index: int, start: int, end: int) -> list[tuple[int, int, int]]:
        """What the template's tags mark of this message, with the token that ends the turn if only white space is between."""
        marked = [(max(begin, start), min(stop, end)) for begin, stop in runs(self._rendered.is_generated) if begin < end]
        marked = [(begin, stop) for begin, stop in marked if begin < stop]
        if not marked:
            return []
        begin, stop = marked[-1]
        after = self._whole.next_special(stop)
        if after is not None and after[1] <= end and not self._text[after[1] : end].strip():
            marked[-1] = (begin, after[1])
        return [(index, *span) for span in marked]

    def _tagged_words(self, index: int) -> list[tuple[int, int, int]]:
        """What the tags mark that holds words of this message only, with the token that ends the turn after it."""
        found = []
        for begin, stop in runs(self._rendered.is_generated) if self._whole.has_tags else ():
            if set(self._rendered.message_indices[begin:stop].tolist()) - {-1} == {index}:
                found.append((index, begin, self._end_of_tagged(index, begin, stop)))
        return found

    def _end_of_tagged(self, index: int, begin: int, stop: int) -> int:
        inside = [span for span in self._whole.special if begin <= span[0] < stop][-1:]
        if inside and not self._text[inside[0][1] : stop].strip():
            return inside[0][1]
        after = self._whole.next_special(stop)
        return after[1] if after is not None and self._ends_turns(index, after) else stop


def _beyond(text: str, other: str) -> str:
    """The text from the first character on in which it differs from the other."""
    same = next(
        (n for n, (ours, theirs) in enumerate(zip(text, other, strict=False)) if ours != theirs), min(len(text), len(other))
    )
    return text[same:]


def _unproven(index: int, what: str) -> str:
    return (
        f"it cannot be proven from the chat template where the assistant's message {index} {what}; "
        "set input.chat_template to a template that shows it"
    )
