"""An item -> a chat: the shapes that people's data has, and what else in an item decides what a model reads.

| the item has | the chat |
|---|---|
| `messages`, `conversations`, `conversation`, `chat` (or `input.field`) | that list: {role, content}, or {from, value} |
| `prompt` and `completion`, lists | the prompt, then the completion; only the completion's answers are learnt |
| `prompt` and `completion`, texts | a user's turn and an answer |
| `prompt` alone, a list | that list, for the teacher to answer |
| `system` | a first message, where the chat has none of that role |
| `tools`, or `functions`; `documents` | for the template |
| `chat_template_kwargs` | arguments of the template |

Lists and objects may be JSON text.

Of a table, a null in a struct is a key that another item has: it is left out, at every depth. JSON says what it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kdcache.config.chat import RESERVED_ARGUMENTS
from kdcache.errors import InputError
from kdcache.inputs.chat import LEARN_KEYS, Chat, is_learnt

MESSAGE_NAMES = ("messages", "conversations", "conversation", "chat")
PAIR = ("prompt", "completion")
ASKED = ("instruction", "question", "query", "input", "prompt")
ANSWERED = ("output", "answer", "response", "completion")
"""What other shapes call the two. They are not read: how their parts are joined is the choice of whoever trained on them."""
READ_ALONGSIDE = ("system", "tools", "functions", "documents", "chat_template_kwargs")
UNUSED = (
    "system_prompt", "image", "images", "video", "videos", "audio", "audios", "label", "weight", "weights", "train", "training",
    "chosen", "rejected", "tool_choice", "parallel_tool_calls", "response_format", "response", "history", "loss_mask",
    "system_message", "instructions", "context", "reasoning", "reasoning_content", "reasoning_effort", "thinking", "thoughts",
    "enable_thinking", "tool_calls", "available_tools", "mask", "masks", "labels", "assistant_mask", "assistant_masks",
    "completion_mask", "prompt_mask", "roles_to_train", "train_on_inputs",
)  # fmt: skip
"""Names that affect the prompt or the mask in some data and are not used here; so is whatever the template reads."""

ROLES_BY_NAME = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool", "ipython": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip


def content_names(names: Sequence[str], field: str | None) -> list[str]:
    """List which of an item's names hold its messages."""
    if field is not None:
        return [field] if field in names else []
    found = [name for name in MESSAGE_NAMES if name in names][:1]
    return found or ([name for name in PAIR if name in names] if PAIR[0] in names else [])


def shapes(names: Sequence[str]) -> str:
    """Say what an item needs to be a chat, and how these names would become one."""
    wanted = f"a chat is one of {', '.join(MESSAGE_NAMES)}, or {' and '.join(PAIR)}"
    asked, answer = (next((name for name in known if name in names), None) for known in (ASKED, ANSWERED))
    if asked is None or answer is None:
        return wanted
    rest = " followed by 'input'" if asked == "instruction" and "input" in names else ""
    return f"{wanted}: make {asked!r}{rest} the {PAIR[0]} and {answer!r} the {PAIR[1]}"


def read_names(names: Sequence[str], field: str | None, variables: frozenset[str]) -> list[str]:
    """List the names of an item that a chat is made of, or that must be reported if they are not used."""
    content = content_names(names, field)
    beside = {*READ_ALONGSIDE, *UNUSED, *MESSAGE_NAMES, *PAIR, *variables}
    return [*content, *(name for name in names if name in beside and name not in content)]


def chat_of(item: Mapping[str, Any], field: str | None, where: str, *, is_table: bool, variables: frozenset[str]) -> Chat:
    """Make the chat of an item.

    Args:
        item: what `read_names` names of it; null is as good as absent.
        field: `input.field`.
        where: file and line or item, for messages.
        is_table: nulls in structs are absent keys.
        variables: names that the chat template reads.

    Raises:
        InputError: something has another type; names it.
    """
    names = content_names(list(item), field)
    if names and _is_nothing(item[names[0]]):  # of tables that were joined, an item has one of several columns
        filled = content_names([name for name, value in item.items() if not _is_nothing(value)], field)
        names = [name for name in PAIR if name in item] if filled[:1] == [PAIR[0]] else filled or names
    item = _unpacked({name: value for name, value in item.items() if not _is_nothing(value)}, names, where)
    if is_table:
        item = {name: without_nulls(value) for name, value in item.items()}
    messages = _messages_of(item, names, where)
    used = {*names, *READ_ALONGSIDE}
    unused = [name for name in item if name not in used and name in {*UNUSED, *MESSAGE_NAMES, *PAIR, *variables}]
    sentences = [f"{name!r} of the item is not used" for name in unused]
    system = item.get("system")
    if messages and isinstance(system, str) and system.strip():
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0].get("content") != system:
            sentences.append("'system' of the item is not used: the chat has a system message of its own")
    elif system is not None and not isinstance(system, str):
        raise InputError(f"{where}: 'system' is {shown(system)}, but must be text")
    tools = _listed(item, "tools", where)
    functions = [{"type": "function", "function": each} for each in _listed(item, "functions", where) or ()] or None
    if tools and functions:
        sentences.append("'functions' of the item is not used: it has 'tools' too")
    return Chat(messages, tools or functions, _listed(item, "documents", where), _arguments(item, where), tuple(sentences))


def parse_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Parse messages: each has a known role, and text for content if it has any.

    Raises:
        InputError: as `chat_of`.
    """
    value = _from_json(value, where)
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        if len(set(map(len, value.values()))) > 1:
            lengths = ", ".join(f"{name!r} has {len(column)}" for name, column in value.items())
            raise InputError(f"{where} is one list for each key of a message, but their lengths differ: {lengths}")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise InputError(f"{where} is {shown(value)}, but content 'messages' needs a list of {{role, content}}")
    return [_parse_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def without_nulls(value: Any) -> Any:
    """Drop the keys whose value is null, at every depth; a null in a list stays."""
    if isinstance(value, Mapping):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return [without_nulls(child) for child in value] if isinstance(value, list) else value


def _unpacked(item: dict[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """Unpack an object of messages and more that stands where the messages should."""
    name = next((name for name in names if name in item), None)
    value = item.get(name) if name is not None and name != PAIR[0] else None
    value = _from_json(value, f"{where} {name!r}")
    if name is None or not isinstance(value, Mapping) or "messages" not in value:
        return item
    beside = {key: child for key, child in value.items() if key != "messages" and not _is_nothing(child)}
    return {**beside, **item, name: value["messages"] or []}


def _messages_of(item: Mapping[str, Any], names: Sequence[str], where: str) -> list[dict[str, Any]]:
    there = [name for name in names if name in item]
    if not there:
        return []
    if names == [PAIR[0]] and isinstance(_messages_or_text(item[PAIR[0]]), str):
        raise InputError(f"{where} 'prompt' is {shown(item[PAIR[0]])}; without a 'completion', it must be a list of messages")
    if names[0] != PAIR[0] or names == [PAIR[0]]:
        return parse_messages(item[there[0]], f"{where} {there[0]!r}")
    prompt, completion = (_messages_or_text(item.get(name, "")) for name in PAIR)
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(completion, Mapping):
        completion = [completion]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise InputError(f"{where}: 'prompt' and 'completion' are {kinds}, but must be two texts or two lists of messages")
    given = [message | {"weight": 0} if message["role"] == "assistant" else message
             for message in parse_messages(prompt, f"{where} 'prompt'")]  # fmt: skip
    return [*given, *parse_messages(completion, f"{where} 'completion'")]


def _parse_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {shown(message)}, but a message is an object with `role` and `content`")
    fields = {str(name): value for name, value in message.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields = {{"from": "role", "value": "content"}.get(name, name): value for name, value in fields.items()}
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES_BY_NAME:
        raise InputError(f"{where}.role is {shown(role)}, but must be one of {', '.join(ROLES_BY_NAME)}")
    fields["role"] = ROLES_BY_NAME[role]
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(fields["content"], f"{where}.content")
    if not isinstance(fields.get("content", ""), str):
        raise InputError(f"{where}.content is {shown(fields['content'])}, but must be text")
    if role == "function_call":
        fields = _as_call(fields, where)
    if isinstance(fields.get("function_call"), Mapping) and "tool_calls" not in fields:  # OpenAI's, before there were tools
        fields["tool_calls"] = [{"type": "function", "function": dict(fields.pop("function_call"))}]
    if isinstance(fields.get("tool_calls"), str):
        fields["tool_calls"] = _listed(fields, "tool_calls", where)
    if not fields.get("tool_calls", True):  # no calls; some templates ask whether the key is there
        del fields["tool_calls"]
    if is_learnt(fields, where) and fields["role"] != "assistant" and any(name in fields for name in LEARN_KEYS):
        name = next(name for name in LEARN_KEYS if name in fields)
        # 1 is what some writers put everywhere.
        if name != "weight":
            raise InputError(
                f"{where}.{name} asks to learn a message of the {role}, but only the assistant's messages are learnt"
            )
    if not fields.keys() - {"role", *LEARN_KEYS}:
        fields["content"] = ""
    return fields


def _joined(parts: list[Any], where: str) -> str:
    """Join the text of parts, as templates that take parts write them."""
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise InputError(f"{where}[{index}] has the type {part['type']!r}, but only text is read")
        if not isinstance(text, str):
            raise InputError(f"{where} is {shown(parts)}, but must be text, or a list of {{type: text, text}}")
        texts.append(text)
    return "".join(texts)


def _as_call(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert ShareGPT's `function_call`: {"name", "arguments"} as JSON text instead of what the assistant says."""
    call = _from_json(fields.pop("content", ""), f"{where}.content")
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in calls):
        raise InputError(f"{where} is a function_call, but its text is not a JSON object with a `name`")
    return fields | {"role": "assistant", "tool_calls": [{"type": "function", "function": dict(each)} for each in calls]}


def _listed(item: Mapping[str, Any], name: str, where: str) -> list[Any] | None:
    value = item.get(name)
    if value is None:
        return None
    value = _from_json(value, f"{where}: {name!r}")
    if value is None:
        return None
    if isinstance(value, list):
        items: list[Any] = [
            _from_json(each, f"{where}: {name!r}") if isinstance(each, str) and "{" in each else each for each in value
        ]
        if all(isinstance(each, Mapping) for each in items):
            return [dict(each) for each in items] or None
    raise InputError(f"{where}: {name!r} is {shown(value)}, but must be a list of objects, or that as JSON text")


def _arguments(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = "chat_template_kwargs"
    value = _from_json(item.get(name, {}), f"{where}: {name!r}")
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {name!r} is {shown(value)}, but must be an object of the template's arguments")
    for argument in RESERVED_ARGUMENTS & set(value):
        raise InputError(f"{where}: {name!r} sets {argument!r}, which items may not set")
    return dict(value)


def _from_json(value: Any, where: str) -> Any:
    """Decode a value that may be JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InputError(f"{where} is {shown(value)}, and that is not JSON: {error}") from error


def _messages_or_text(value: Any) -> Any:
    """Decode a value that may be messages as JSON text; an answer that is a list of calls in JSON stays text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return value
    is_messages = all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in found)
    return found if found and is_messages else value


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def shown(value: Any) -> str:
    """Show a value in an error's sentence, cut short."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
