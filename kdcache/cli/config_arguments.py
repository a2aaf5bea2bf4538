"""What commands with a config file share: CONFIG.yaml, --set, and the list of fields in their help."""

from __future__ import annotations

import argparse
import textwrap
from typing import TypeVar

import msgspec

from kdcache.config.describe import describe_fields
from kdcache.errors import ConfigError

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
    """Load the config that the arguments name; raises ConfigError, which names the command that a config is for."""
    from kdcache.config.load import load_config

    try:
        return load_config(args.config, config_type, args.overrides)
    except ConfigError as error:
        command = _other_command(args.config, config_type)
        if command is None:
            raise
        raise ConfigError(
            f"{args.config}: this is a config of `kdcache {command}`; run `kdcache {command} {args.config}`"
        ) from error


def _other_command(path: str, config_type: type[msgspec.Struct]) -> str | None:
    """The command whose config has every required field in the file, where the file lacks one that this command requires."""
    from kdcache.config.capture import CaptureConfig
    from kdcache.config.load import read_yaml_mapping
    from kdcache.config.train import TrainConfig

    try:
        given = read_yaml_mapping(path).keys()
    except ConfigError:
        return None
    if _required(config_type) <= given:
        return None
    others: dict[str, type[msgspec.Struct]] = {"capture": CaptureConfig, "train": TrainConfig}
    return next((name for name, other in others.items() if other is not config_type and _required(other) <= given), None)


def _required(config_type: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(config_type) if field.required}


def field_list(config_type: type[msgspec.Struct]) -> str:
    """Every field with its type, default and documentation, for a help page."""
    entries = []
    for field in describe_fields(config_type):
        default = "required" if field.default is None else f"default {field.default or repr('')}"
        text = textwrap.fill(field.text, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        entries.append(f"  {field.path}  ({field.type}; {default})\n{text}")
    return "\n".join(entries)
