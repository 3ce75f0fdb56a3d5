"""Path patterns: literal text with captures, matched and written back without loss.

A path is a `/`-joined string of non-empty elements. In a pattern

- `{i}` (one lower-case letter) stands for an integer as Python prints it: `0`, `12`, never `07`;
- `{name}` (two or more of `a-z 0-9 _`) stands for one path element, or for a part of one;
- `{rest...}` stands for any number of whole elements, none included, once per pattern.

Captures may sit inside an element (`Block_{i}`). A pattern whose captures could be read in two
ways is refused when it is built, so that matching a path and writing it again are inverses:

    >>> pattern = Pattern("params/Block_{i}/{rest...}")
    >>> pattern.match("params/Block_3/fc/kernel")
    {'i': '3', 'rest': 'fc/kernel'}
    >>> pattern.format({"i": "3", "rest": "fc/kernel"})
    'params/Block_3/fc/kernel'
    >>> Pattern("{i}{j}")  # 123 may be 1 and 23, or 12 and 3  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: pattern `{i}{j}`: two captures of one element need text with a non-digit between...
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_CAPTURE = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.\.\.)?")
_SUB = {"integer": r"(?P<{}>0|[1-9][0-9]*)", "element": r"(?P<{}>[^/]+)"}


def is_integer(capture: str) -> bool:
    """Whether a capture's name makes it an integer capture (one letter)."""
    return len(capture) == 1


@dataclass(frozen=True)
class Pattern:
    """One parsed pattern. Raises `ValueError` for text that is malformed or ambiguous."""

    text: str
    captures: tuple[str, ...] = field(init=False, compare=False)
    """The names of its captures, in order of appearance."""
    _regex: re.Pattern[str] | None = field(init=False, compare=False, repr=False)
    """Of the path with a slash at its end, so that each element has one."""
    _rest: str | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        elements = self.text.split("/")
        if not all(elements):
            raise ValueError(f"pattern `{self.text}` holds an empty path element")
        _check_elements(self.text, elements)
        captures: list[str] = []
        rest = None
        regex = ""
        for element in elements:
            names = _CAPTURE.findall(element)
            if any(name.endswith("...") for name in names):
                # Two of them could share the elements between them in many ways.
                if rest is not None:
                    raise ValueError(f"pattern `{self.text}` has more than one `{{rest...}}`")
                rest = _check_name(self.text, names[0]).removesuffix("...")
                if element != f"{{{names[0]}}}" or rest in captures or is_integer(rest):
                    raise ValueError(
                        f"pattern `{self.text}`: `{{{names[0]}}}` must be an element of its own, "
                        "with a name of two or more letters that occurs once"
                    )
                captures.append(rest)
                regex += f"(?P<{rest}>(?:[^/]+/)*)"
            else:
                regex += _element_regex(self.text, element, captures) + "/"
        # The fields of a frozen dataclass can be set in no other way.
        object.__setattr__(self, "captures", tuple(captures))
        object.__setattr__(self, "_rest", rest)
        object.__setattr__(self, "_regex", re.compile(regex) if captures else None)

    @property
    def literal(self) -> bool:
        """Whether the pattern holds no capture and so matches one path only."""
        return self._regex is None

    @property
    def length(self) -> int | None:
        """The number of elements of every path it matches; None if that varies."""
        return None if self._rest else self.text.count("/") + 1

    def match(self, path: str) -> dict[str, str] | None:
        """The text of each capture if `path` matches, else None."""
        if self._regex is None:
            return {} if path == self.text else None
        found = self._regex.fullmatch(f"{path}/")
        if found is None:
            return None
        values = found.groupdict()
        # The regex has a slash behind each element that it stands for: "fc/kernel/".
        if self._rest:
            values[self._rest] = values[self._rest].removesuffix("/")
        return values

    def format(self, captures: Mapping[str, str]) -> str:
        """The path in which every capture has the given text; the inverse of `match`."""
        if not self._rest:
            return self.text.format_map(captures)
        # With no element in it, its slash must go as well: `a/{rest...}/b` becomes `a/b`.
        text = f"{self.text}/".replace(f"{{{self._rest}...}}/", f"{{{self._rest}}}")
        elements = captures[self._rest]
        rest = {self._rest: f"{elements}/" if elements else ""}
        return text.format_map({**captures, **rest}).removesuffix("/")


def _check_elements(text: str, elements: list[str]) -> None:
    """Refuses names that no store can write, so that no conversion ends on one halfway."""
    for element in elements:
        if element in (".", ".."):
            raise ValueError(f"pattern `{text}`: `{element}` stands for a directory")
    if "\0" in text:
        raise ValueError(f"pattern {text!r} holds a NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can also spell halves of characters, such as `\ud800`
            raise ValueError(f"pattern {text!r} holds half a character") from None


def _check_name(text: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"pattern `{text}`: `{{{name}}}` is no capture; write `{{i}}` for an integer, "
            "`{name}` for an element, `{rest...}` for any number of elements"
        )
    return name


def _element_regex(text: str, element: str, captures: list[str]) -> str:
    """The regex of one element; appends the captures that it introduces to `captures`."""
    # Text and names of captures by turns: `a{i}b` gives "a", "i", "b".
    pieces = _CAPTURE.split(element)
    literals, names = pieces[::2], pieces[1::2]
    if re.search(r"[{}]", "".join(literals)):
        raise ValueError(f"pattern `{text}` holds an unbalanced brace")
    # `{i}1{j}` would read 212 as 2 and 2, and 1111 in two ways.
    if any(not re.search(r"[^0-9]", between) for between in literals[1:-1]):
        raise ValueError(
            f"pattern `{text}`: two captures of one element need text with a non-digit between "
            "them, else a path can be read in more than one way"
        )
    # `{a}_{b}` could part `x_y_z` at either underscore.
    if sum(not is_integer(name) for name in names) > 1:
        raise ValueError(f"pattern `{text}`: an element can hold one `{{name}}` only")
    regex = re.escape(literals[0])
    for name, literal in zip(names, literals[1:], strict=True):
        _check_name(text, name)
        # A name that occurs again stands for the same text.
        if name in captures:
            regex += f"(?P={name})"
        else:
            captures.append(name)
            regex += _SUB["integer" if is_integer(name) else "element"].format(name)
        regex += re.escape(literal)
    return regex
