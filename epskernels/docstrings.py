"""What many functions say of their arguments stands once, and is put into each docstring: help() and the reference show it."""

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["described"]

F = TypeVar("F", bound=Callable[..., Any])
_ENTRY = re.compile(r"(\w+(?:, \w+)*): ")


def described(*texts: Mapping[str, str]) -> Callable[[F], F]:
    """A decorator: the docstring then tells each argument, in the order of the signature, on a line of its own.

    texts: by the argument's name, later ones before earlier ones; only what the docstring does not tell itself is taken. In the
    docstring the arguments come after the prose, each from the beginning of a line ("eta: ...", or "low, high: ..."); what
    begins with "Raises" comes last.
    Raises ValueError for an argument of which neither says anything.
    """
    common = {name: text for each in texts for name, text in each.items()}

    def decorate(function: F) -> F:
        if function.__doc__ is not None:  # python -OO
            function.__doc__ = _completed(function, common)
        return function

    return decorate


def _completed(function: Callable[..., Any], common: Mapping[str, str]) -> str:
    names = list(inspect.signature(function).parameters)
    prose, own, last = _parts(inspect.cleandoc(function.__doc__ or ""), names)
    missing = [name for name in names if not any(name in group for group in own) and name not in common]
    if missing:
        raise ValueError(f"{function.__name__}: expected a text for each argument, found none for {', '.join(missing)}")
    lines = []
    for name in names:
        group = next((group for group in own if name in group), None)
        if group is None:
            lines.append(_wrapped(f"{name}: {common[name]}"))
        elif name == group[0]:
            lines.append(_wrapped(f"{', '.join(group)}: {own[group]}"))
    return "\n".join(["\n".join(prose).rstrip(), "", *lines, *last])


def _parts(doc: str, names: list[str]) -> tuple[list[str], dict[tuple[str, ...], str], list[str]]:
    """The lines of prose; the text of each argument, or group of them; and the lines from the one that tells the errors."""
    prose: list[str] = []
    own: dict[tuple[str, ...], str] = {}
    lines = doc.splitlines()
    for i, line in enumerate(lines):
        found = _ENTRY.match(line)
        if line.startswith("Raises"):
            return prose, own, lines[i:]
        if found and set(group := tuple(found[1].split(", "))) <= set(names):
            own[group] = line[found.end() :]
        elif own:
            own[group] += " " + line.strip()
        else:
            prose.append(line)
    return prose, own, []


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
