"""Read options from the command line, --config, and the config.json of a run."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from models.pretrain.config import Config

_DERIVED = ("corpus", "model_digest")  # entries of config.json that are not options

ConfigT = TypeVar("ConfigT", bound=Config)


def parse(config_type: type[ConfigT], command: str, arguments: Sequence[str] | None = None) -> ConfigT:
    """Return the options of the command line.

    An option that is not on the command line comes from the file --config. If the file does not have it either, it
    comes from the config.json of the run with --resume, and otherwise it has its default.

    Raises:
        ValueError: If a file of options has invalid syntax, an unknown name or an invalid value.
        OSError: If a file of options cannot be read.
    """

    def parsed(default: ConfigT) -> ConfigT:
        # The groups remain in the help, but flags have no prefix with the name of a group.
        markers = (tyro.conf.OmitArgPrefixes,)
        return tyro.cli(config_type, prog=command, args=arguments, default=default, config=markers)

    default = config_type()
    given = parsed(default)
    output = given.output
    files = [] if output.config is None else [(output.config, read_options(output.config))]
    if output.resume and output.out is not None and (output.out / "config.json").is_file():
        record = output.out / "config.json"
        files.insert(0, (record, Config.defaults_before | read_options(record)))
    for file, options in files:
        default = with_options(default, options, file)
    return parsed(default) if files else given


def read_options(file: Path) -> dict[str, Any]:
    """Read options by name from a file in JSON, or in TOML if its name ends in .toml.

    Options may be at the top level, or in tables with the names of the groups.

    Raises:
        ValueError: If the file is not a regular file, or not such a table in JSON or TOML. The message names the file.
        OSError: If the file cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"`config` must name a file, got {str(file)!r}, which is a folder, a pipe or a device")
    try:
        content = file.read_text()
        options = tomllib.loads(content) if file.suffix == ".toml" else json.loads(content)
    except (ValueError, RecursionError) as error:  # the errors of json, tomllib and of decoding are ValueErrors
        raise ValueError(f"`config` must name options in JSON or TOML, got {str(file)!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"`config` must name an object of options, got {options!r:.80} in {str(file)!r}")
    groups = [options.pop(group.name) for group in fields(Config) if isinstance(options.get(group.name), dict)]
    return {name: value for table in [options, *groups] for name, value in table.items()}


def with_options(config: ConfigT, options: Mapping[str, Any], file: Path) -> ConfigT:
    """Return the configuration with some options replaced.

    Raises:
        ValueError: If a name is not an option, or a value has a wrong type. The message names the option and the file.
    """
    unknown = sorted(options.keys() - config.options().keys() - {*_DERIVED})
    if unknown:
        raise ValueError(f"`config` must have only options of this program, got {unknown[0]!r} in {str(file)!r}")
    groups = {}
    for group in fields(config):
        values = getattr(config, group.name)
        hints = get_type_hints(type(values))
        given = {name: options[name] for name in vars(values) if name in options}
        groups[group.name] = replace(values, **{name: _value(name, hints[name], given[name], file) for name in given})
    return replace(config, **groups)


def _value(name: str, hint: Any, value: Any, file: Path) -> Any:
    """Convert a value from JSON or TOML to the type of an option."""
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        origin, arguments = get_origin(kind), get_args(kind)
        if (kind is type(None) and value is None) or (origin is Literal and value in arguments):
            return value
        if origin is tuple and (value is None or isinstance(value, list)):  # None in records of older versions
            return tuple(_value(name, arguments[0], item, file) for item in value or ())
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and type(value) in (int, float) and not math.isnan(value):
            return value
        if kind in (bool, int, str) and type(value) is kind:
            return value
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"`{name}` must be of type {expected}, got {value!r} in {str(file)!r}")
