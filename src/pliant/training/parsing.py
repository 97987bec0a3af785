"""From YAML files and `key.sub=value` overrides to sections of a configuration; every refusal is one line."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any

import yaml
from pydantic import ValidationError

from pliant.errors import ConfigError, suggest
from pliant.training.section import Section

SectionT = typing.TypeVar("SectionT", bound=Section)


def read_tree(file: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, changed by `key.sub=value` overrides. Raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} should hold `key: value` pairs at the top level, e.g. `steps: 1000`")
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = key.strip().split(".")
    for name in parents:
        # `dict | None` sections may be absent or null in the file.
        if not isinstance(tree.get(name), dict):
            if tree.get(name) is not None:
                raise ConfigError(f"override {override!r}: {name} is {tree[name]!r}, not a section")
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def parse_section(section: type[SectionT], tree: Mapping[str, Any]) -> SectionT:
    """A section of any kind from nested mappings. Raises ConfigError in one line."""
    _reject_unknown(section, tree, "")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        # Union tags appear in pydantic's locations; a reader's keys are those that the file really has.
        tags = set(_tags_below(section))
        where = ".".join(str(part) for part in first["loc"] if str(part) not in tags)
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise ConfigError(f"config{' key ' + where if where else ''}: {message}{given}") from None


def _sections(annotation: Any) -> list[type[Section]]:
    """The Section classes in an annotation such as `X | None` or `Annotated[X | Y, ...]`."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, UnionType):
        return [section for option in typing.get_args(annotation) for section in _sections(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _tags(section: type[Section]) -> tuple[Any, ...]:
    """Values of the `name` that tells a section apart from others in its place."""
    return typing.get_args(section.model_fields["name"].annotation)


def _tags_below(section: type[Section]) -> Iterator[str]:
    """Tags of all sections that may stand somewhere in this one."""
    for info in section.model_fields.values():
        options = _sections(info.annotation)
        for option in options:
            if len(options) > 1 and "name" in option.model_fields:
                yield from _tags(option)
            yield from _tags_below(option)


def _reject_unknown(section: type[Section], tree: Any, prefix: str) -> None:
    """Pydantic refuses unknown keys too, but does not say which name was meant."""
    if not isinstance(tree, Mapping):
        return
    fields = {info.alias or name: info for name, info in section.model_fields.items()}
    for key, value in tree.items():
        if key not in fields:
            where = f" in {prefix.rstrip('.')}" if prefix else ""
            raise ConfigError(f"unknown config key {str(key)!r}{where}: {suggest(str(key), fields)}")
        options = _sections(fields[key].annotation)
        if len(options) > 1 and isinstance(value, Mapping):
            options = _tagged(options, value, f"{prefix}{key}")
        if options:
            _reject_unknown(options[0], value, f"{prefix}{key}.")


def _tagged(options: list[type[Section]], value: Mapping[str, Any], where: str) -> list[type[Section]]:
    names = {tag: option for option in options for tag in _tags(option)}
    name = value.get("name")
    if name not in names:
        raise ConfigError(f"config key {where}.name is {name!r}: {suggest(str(name), names)}")
    return [names[name]]
