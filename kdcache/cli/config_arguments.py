"""What commands with a config file share: CONFIG.yaml, --set, and the list of fields in their help."""

from __future__ import annotations

import argparse
import textwrap
from typing import TypeVar

import msgspec

from kdcache.config.describe import describe_fields

C = TypeVar("C", bound=msgspec.Struct)


def add_config_arguments(parser: argparse.ArgumentParser, config_type: type[msgspec.Struct], *, example: str) -> None:
    """Declare the config file and the overrides, and list every field at the end of the help."""
    parser.add_argument("config", metavar="CONFIG.yaml", help=f"the config; configs/{example} is a commented example")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
        help="override a field; the value is YAML, as in limit=null or 'paths=[a.txt, b.txt]'; may be repeated",
    )  # fmt: skip
    parser.epilog = f"fields of the config (--set overrides any of them):\n\n{field_list(config_type)}"


def read_config(args: argparse.Namespace, config_type: type[C]) -> C:
    """Load the config that the arguments name; raises ConfigError."""
    from kdcache.config.load import load_config

    return load_config(args.config, config_type, args.overrides)


def field_list(config_type: type[msgspec.Struct]) -> str:
    """Every field with its type, default and documentation, for a help page."""
    entries = []
    for field in describe_fields(config_type):
        default = "required" if field.default is None else f"default {field.default or repr('')}"
        text = textwrap.fill(field.text, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        entries.append(f"  {field.path}  ({field.type}; {default})\n{text}")
    return "\n".join(entries)
