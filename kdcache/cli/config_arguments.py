"""What every command with a config file shares: CONFIG.yaml, --set, and the list of fields in its help."""

from __future__ import annotations

import argparse
import textwrap
from typing import TypeVar

import msgspec

from kdcache.config.describe import describe_fields

C = TypeVar("C", bound=msgspec.Struct)


def add_config_arguments(parser: argparse.ArgumentParser, config_type: type[msgspec.Struct], *, example: str) -> None:
    """Declare the config file and the overrides, and list every field below the help."""
    parser.add_argument("config", metavar="CONFIG.yaml", help=f"the config; configs/{example} is a complete, commented example")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
        help="override a field, as in --set selection.tau=0.02 or --set 'input.paths=[a.txt, b.txt]'; the value is YAML",
    )  # fmt: skip
    parser.epilog = f"fields of the config, each of which --set can override:\n\n{field_list(config_type)}"


def read_config(args: argparse.Namespace, config_type: type[C]) -> C:
    """The config that the arguments name; raises ConfigError."""
    from kdcache.config.load import load_config

    return load_config(args.config, config_type, args.overrides)


def field_list(config_type: type[msgspec.Struct]) -> str:
    """Every field with its type, default and text, for a help page."""
    entries = []
    for field in describe_fields(config_type):
        default = "required" if field.default is None else f"default {field.default or repr('')}"
        text = textwrap.fill(field.text, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        entries.append(f"  {field.path}  ({field.type}; {default})\n{text}")
    return "\n".join(entries)
