"""Options of a command: dataclass fields as ``--options``, YAML files, and one-line errors."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union

from jsonargparse import ArgumentParser

from vitmix.errors import InputError
from vitmix.train.config import suggest

__all__ = ["Parser"]


class Parser:
    """A thin shell around jsonargparse that speaks in single lines.

    Args:
        program: as the user types it.
        summary: what the command does.
        example: a command line that works.
    """

    def __init__(self, program: str, summary: str, example: str) -> None:
        self.program = program
        self.parser = ArgumentParser(
            prog=program,
            description=f"{summary[0].upper()}{summary[1:]}.\n\nexample:\n  {example}",
            exit_on_error=False,
            allow_abbrev=False,
            print_config="--print-config",
            formatter_class=_HelpFormatter,
            add_help=True,
        )
        self.names: list[str] = []
        self.types: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.groups: dict[str, Any] = {}
        self.base: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def add(
        self,
        name: str,
        kind: Any,
        default: Any,
        text: str,
        group: str | None = None,
        count: int | None = None,
    ) -> None:
        """Add an option (``--name``) or, without dashes, a positional argument.

        A positional argument with a default may be left out; one of a list type takes several.

        Args:
            name: as the user types it.
            kind: type of the value.
            default: value where none is given.
            text: help.
            group: heading that the help stands under.
            count: number of values of an option that takes several.
        """
        target: Any = self.parser
        if group is not None:
            if group not in self.groups:
                self.groups[group] = self.parser.add_argument_group(group)
            target = self.groups[group]
        shown = "" if default is None else f" [{_plain(default)}]"
        if not name.startswith("-"):
            may_lack: dict[str, Any] = {}
            if typing.get_origin(kind) is list:
                kind, may_lack = typing.get_args(kind)[0], {"nargs": "+"}
            elif default is not None or type(None) in typing.get_args(kind):
                may_lack = {"nargs": "?", "default": default}
            target.add_argument(name, type=kind, help=text + shown, **may_lack)
        elif kind is bool:
            # A bare switch is true; `--model-ema false` is understood as well.
            target.add_argument(
                name, type=bool, nargs="?", const=True, default=default, help=text,
                metavar="BOOL",
            )  # fmt: skip
        elif count is not None:
            kind = typing.get_args(_members(kind)[0])[0]
            target.add_argument(
                name, type=kind, nargs=count, default=default, help=text + shown,
                metavar=_metavar(kind),
            )  # fmt: skip
        else:
            target.add_argument(
                name, type=kind, default=default, help=text + shown, metavar=_metavar(kind)
            )
        self.names.append(name)
        key = name.lstrip("-").replace("-", "_")
        self.types[key] = kind
        self.defaults[key] = default

    def add_config(
        self,
        config: type,
        leave_out: tuple[str, ...] = (),
        only: tuple[str, ...] | None = None,
        base: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        instead: Mapping[str, Any] | None = None,
    ) -> None:
        """Add ``--config`` and every field of a dataclass made of ``option`` fields.

        Their values are parsed where they are given; the dataclass has the defaults.

        Args:
            config: the dataclass.
            leave_out: fields that are no options of this command.
            only: the fields that are; all by default.
            base: gives the defaults of what the user chose.
            instead: defaults that the command itself puts in place of the dataclass's.
        """
        self.base = base
        self.parser.add_argument(
            "--config", action="config", help="YAML file with any of these options", metavar="FILE"
        )
        self.names.append("--config")
        hints = typing.get_type_hints(config)
        for field in fields(config):
            if field.name not in leave_out and (only is None or field.name in only):
                self.add(
                    "--" + field.name.replace("_", "-"),
                    hints[field.name],
                    {field.name: field.default, **(instead or {})}[field.name],
                    field.metadata["help"],
                    field.metadata["group"],
                    field.metadata["count"],
                )
                del self.defaults[field.name]

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """The values of all options; those of a config only where they are given.

        Raises:
            InputError: names the option, what was expected and what came.
        """
        words = [_normal(argument) for argument in arguments]
        try:
            quiet = [word for word in words if word.partition("=")[0] != "--print-config"]
            given = self.parser.parse_args(quiet, defaults=False).as_dict()
            base = {} if self.base is None else self.base(given)
            if len(quiet) < len(words):
                self.parser.set_defaults(base)
                self.parser.parse_args(words)  # prints, and ends the program
        except UnicodeDecodeError as error:
            raise InputError(f"expected --config to be valid YAML, got: {error}") from error
        except argparse.ArgumentError as error:
            raise InputError(self._explain(str(error))) from error
        plain: dict[str, Any] = self.defaults | base | given
        plain.pop("config", None)
        return plain

    def typed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values from a file as the options' types say.

        Raises:
            InputError: names the option, what was expected and what came.
        """
        try:
            found: dict[str, Any] = self.parser.parse_object(dict(values), defaults=False).as_dict()
        except argparse.ArgumentError as error:
            raise InputError(self._explain(str(error))) from error
        return found

    def _explain(self, message: str) -> str:
        """One line in our words for one of jsonargparse's messages."""
        see = f"see {self.program} --help"
        unknown = re.search(r"unrecognized arguments: (.*)", message)
        if unknown:
            first = next(
                (w for w in unknown[1].split() if w.startswith("-")), unknown[1].split()[0]
            )
            word = first.split("=")[0]
            if not word.startswith("-"):
                return f"expected only options, got {word!r}; {see}"
            return f"expected an option of {self.program}, got {word!r}{self._near(word)}; {see}"
        key = re.search(
            r"[Oo]ption '([\w.-]+)' is not accepted|[Kk]ey '?([\w.-]+)'? is not", message
        )
        if key:
            word = key[1] or key[2]
            return f"expected an option in the file, got {word!r}{self._near(word)}; {see}"
        absent = re.search(r"File does not exist: '(.*)'", message)
        if absent:
            return f"expected --config to be a YAML file, there is no {absent[1]}"
        if "Problems parsing config" in message:
            detail = " ".join(message.split("parsing config:")[-1].split())
            return f"expected --config to be valid YAML, got: {detail}"
        missing = re.search(r"argument (--[\w-]+): expected (one|\d+) argument", message)
        if missing:
            what = "a value" if missing[2] == "one" else f"{missing[2]} values"
            came = "none" if missing[2] == "one" else "another number of them"
            return f"expected {what} after {missing[1]}, got {came}; {see}"
        value = re.search(r"(?:Got value|Given value): (.*)", message)
        named = re.search(r'key "([\w.]+)"', message)
        if named and value and named[1] in self.types:
            option = "--" + named[1].replace("_", "-")
            return f"expected {option} to be {_describe(self.types[named[1]])}, got {value[1]!r}"
        required = re.search(r'[Kk]ey "?(\w+)"? is required|required: (\w+)', message)
        if required:
            word = required[1] or required[2]
            return f"expected the argument {word.upper()}, got none; {see}"
        return f"{' '.join(message.split())}; {see}"

    def _near(self, word: str) -> str:
        return suggest("--" + word.lstrip("-").replace("_", "-"), self.names)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the example's line breaks; leaves jsonargparse's notes on types out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def _normal(argument: str) -> str:
    """``--batch_size`` as ``--batch-size``, and infinity as YAML spells it."""
    if argument.startswith("--"):
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + (_normal(value) if equals else "")
    return ".inf" if argument.lower() in ("inf", "infinity") else argument


def _members(kind: Any) -> list[Any]:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [member for member in typing.get_args(kind) if member is not type(None)]
    return [kind]


def _metavar(kind: Any) -> str:
    member = _members(kind)[0]
    if typing.get_origin(member) is Literal:
        return "{" + ",".join(typing.get_args(member)) + "}"
    return {int: "N", float: "X"}.get(member, "TEXT")


def _describe(kind: Any) -> str:
    words = []
    for member in _members(kind):
        if typing.get_origin(member) is Literal:
            words.append("one of " + ", ".join(typing.get_args(member)))
        elif (typing.get_origin(member) or member) is dict:
            words.append("a mapping such as {name: value}")
        elif (typing.get_origin(member) or member) is list:
            words.append("a list")
        else:
            names = {int: "a whole number", float: "a number", bool: "true or false"}
            words.append(names.get(member, "text"))
    return " or ".join(words)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
