"""Load a config file, or say in one sentence which field is wrong, what its value is and what it may be.

`yaml_text.py` says how YAML is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kdcache.config.describe import choices_of, element_type, nearest, section_fields, type_at
from kdcache.config.renamed import new_name
from kdcache.config.yaml_text import MAX_YAML_BYTES, check_yaml_size, parse_yaml
from kdcache.credentials import remember
from kdcache.errors import ConfigError

C = TypeVar("C", bound=msgspec.Struct)

_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_WORDS = {"object": "a section (a mapping)", "array": "a list", "str": "text", "bool": "true or false", "int": "a whole number",
          "float": "a number", "null": "null"}  # fmt: skip


def load_config(path: str | Path, config_type: type[C], overrides: Sequence[str] = ()) -> C:
    """Load a config from a YAML file, with some fields overridden.

    Args:
        path: the file.
        config_type: class of the config, which declares the fields.
        overrides: each `section.field=value`; the value is YAML, as in `input.paths=[a.txt, b.txt]` or `input.limit=null`.

    Raises:
        ConfigError: the file cannot be read or is not YAML; a field is unknown, missing or has a wrong value. The message
            starts with the path of the file or field.
    """
    fields = read_yaml_mapping(path)
    for override in overrides:
        apply_override(fields, config_type, override)
    return convert_config(fields, config_type, where=str(path))


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises ConfigError, naming file and line, for anything else."""
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_YAML_BYTES + 1)
        check_yaml_size(data, where=str(path))
        text = data.decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; expected a YAML config") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a directory; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; expected a YAML file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    fields = parse_yaml(text, where=str(path))
    if fields is None:
        raise ConfigError(f"{path}: the file is empty; expected a mapping of sections, as in the examples in configs/")
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: the file holds {_shown(fields)}; expected a mapping of sections")
    return fields


def apply_override(fields: dict[str, Any], config_type: type[msgspec.Struct], override: str) -> None:
    """Set one field in the plain mapping of a config.

    Args:
        fields: modified in place; missing sections are created.
        config_type: class of the config, which declares the paths.
        override: `section.field=value`.

    Raises:
        ConfigError: no `=`, an unknown path, or a value that is not YAML.
    """
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r}: expected section.field=value, as in input.limit=100")
    _refuse_unknown_path(parts, config_type)
    section = fields
    for part in parts[:-1]:
        child = section.get(part)
        # A copy: through a YAML alias it may be another section's value too.
        section[part] = section = dict(child) if isinstance(child, dict) else {}
    section[parts[-1]] = parse_yaml(text, where=name)


def convert_config(fields: Mapping[str, Any], config_type: type[C], *, where: str = "") -> C:
    """Make a config of plain values; raises ConfigError as `load_config` does, with messages that start with `where`."""
    prefix = f"{where}: " if where else ""
    remember(fields)  # so that no message shows them
    try:
        _refuse_unknown_fields(fields, config_type)
        return msgspec.convert(fields, config_type)
    except msgspec.ValidationError as error:
        raise ConfigError(prefix + _explain(str(error), fields, config_type)) from error
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def config_to_builtins(config: msgspec.Struct) -> dict[str, Any]:
    """The config with all defaults as plain JSON values, as a manifest records it."""
    return msgspec.to_builtins(config)


def _refuse_unknown_path(parts: Sequence[str], config_type: type[msgspec.Struct]) -> None:
    kind: Any = config_type
    for index, part in enumerate(parts):
        fields = section_fields(kind)
        if fields is None:
            if index and type_at(config_type, parts[:index]) is dict:
                return
            raise ConfigError(f"{'.'.join(parts[:index])} is a value and not a section, so {'.'.join(parts)} does not exist")
        if part not in fields:
            raise ConfigError(_renamed(".".join(parts)) or _unknown(".".join(parts[: index + 1]), part, fields))
        kind = fields[part]
    if section_fields(kind) is not None:
        raise ConfigError(f"{'.'.join(parts)} is a section; set one of its fields: {', '.join(section_fields(kind) or ())}")


def _refuse_unknown_fields(fields: Any, config_type: Any, path: str = "") -> None:
    if isinstance(fields, list):
        for index, value in enumerate(fields):
            _refuse_unknown_fields(value, element_type(config_type), f"{path}[{index}]")
    known = section_fields(config_type)
    if known is None or not isinstance(fields, Mapping):
        return
    for name, value in fields.items():
        here = f"{path}.{name}" if path else str(name)
        if name not in known:
            raise ConfigError(_renamed(_first_path(value, here)) or _unknown(here, str(name), known))
        _refuse_unknown_fields(value, known[name], here)


def _first_path(fields: Any, path: str) -> str:
    """The path of the first value in a section: what a message about the section names."""
    while isinstance(fields, Mapping) and fields:
        name, fields = next(iter(fields.items()))
        path = f"{path}.{name}"
    return path


def _renamed(path: str) -> str | None:
    moved = new_name(path)
    return None if moved is None else f"{path}: no such field; it is now {moved}"


def _unknown(path: str, name: str, known: Mapping[str, Any]) -> str:
    hint = nearest(name, known)
    if hint is None:
        return f"{path}: no such field; expected one of {', '.join(known)}"
    return f"{path}: no such field; did you mean {'.'.join([*path.split('.')[:-1], hint])}?"


def _explain(message: str, fields: Mapping[str, Any], config_type: type[msgspec.Struct]) -> str:
    match = _MESSAGE.fullmatch(message)
    assert match is not None
    what, path = match["what"], match["path"] or ""
    missing = _MISSING.fullmatch(what)
    if missing:
        return f"{path + '.' if path else ''}{missing[1]}: missing, but required"
    if match["key"]:
        return f"{path}: a key is not text"
    value = _value_at(fields, path)
    if what.startswith("Invalid enum value"):
        allowed = choices_of(type_at(config_type, path.split(".")))
        return f"{path}: expected one of {', '.join(map(repr, allowed))}, got {_shown(value)}"
    if what.startswith("Expected "):
        expected = re.sub(r", got `.*`$", "", what.removeprefix("Expected "))
        return f"{path}: expected {_in_words(expected)}, got {_shown(value)}"
    return f"{path}: {what}" if path else what


def _in_words(expected: str) -> str:
    types = re.compile(r"`([^`]*)`")
    return types.sub(lambda m: " or ".join(_WORDS.get(word, word) for word in m[1].split(" | ")), expected)


def _value_at(fields: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        try:
            fields = fields[int(part)] if isinstance(fields, list) else fields[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return fields
    return fields


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section (a mapping)"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
