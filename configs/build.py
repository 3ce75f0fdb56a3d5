"""Frozen dataclasses from plain mappings, exactly, with every mismatch in one `ConfigError`.

Used for the configuration of a run (`configs.schema`) and by each model family for its own options:
`build(Transformer, config.model, at="model")`. Hydra lets a wrong type, a float for a whole number,
`+foo=1` and a typo in an experiment's file pass; nothing of that passes here.
"""

import dataclasses
import difflib
import importlib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from linen_nnx.errors import Refusal

from configs.words import WORDS

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated[int, Range(...)]`: `low` and `high` are included,
    `above` and `below` are not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        named = {
            "at least": self.low,
            "at most": self.high,
            "above": self.above,
            "below": self.below,
        }
        bounds: list[str] = []
        for name, bound in named.items():
            if bound is not None:
                bounds.append(f"{name} {bound:g}")
        return " and ".join(bounds)


Count = Annotated[int, Range(low=1)]
Natural = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(above=0, below=1)]
Share = Annotated[float, Range(low=0, high=1)]
Decay = Annotated[float, Range(low=0, below=1)]


class ConfigError(Refusal):
    """Everything wrong with a configuration: `problems` maps a dotted key to what is wrong."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        text = f"The configuration has {'a problem' if count == 1 else f'{count} problems'}:"
        for key, problem in self.problems.items():
            text += f"\n  {key}: {problem}"
        return text


def refuse(problems: Mapping[str, str]) -> None:
    """Raises `ConfigError` if there are problems."""
    if problems:
        raise ConfigError(problems)


def build(cls: type[T], mapping: Mapping[str, Any], at: str = "") -> T:
    """An instance of the dataclass `cls` from a plain mapping, exactly: no key more, none less
    (but for fields with a default), each value of the field's type and within its range. A whole
    number is taken for a float; nothing else is converted.

    Fields may be bool, int, float, str, Literal, a dataclass, a list or dict of anything, a dict of
    dataclasses, or one of these `| None`, and `Annotated[..., Range(...)]`. A rule between fields
    belongs in `__post_init__`, which raises `ConfigError` with keys relative to the dataclass; it
    runs when the fields are right.

    Args:
      cls: the dataclass.
      mapping: what was composed.
      at: dotted key of `mapping` in the whole configuration, for the messages.

    Raises:
      ConfigError: naming every key that is unknown, missing or wrong.
    """
    prefix = f"{at}." if at else ""
    # With extras, for the ranges are in them.
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
    values, problems = {}, {}
    for key, value in mapping.items():
        if key not in fields:
            known = {*fields, *paths({key: mapping[key] for key in mapping if key in fields})}
            problems[f"{prefix}{key}"] = "unknown key" + did_you_mean(str(key), known, prefix)
            continue
        try:
            values[key] = _value(hints[key], value, f"{prefix}{key}")
        except ConfigError as error:
            problems |= error.problems
    for key, field in fields.items():
        defaults = {field.default, field.default_factory} - {dataclasses.MISSING}
        if key not in mapping and not defaults:
            problems[f"{prefix}{key}"] = f"missing; expected {_expected(hints[key])}"
    # A rule between fields may take their types for granted, so those are refused first.
    refuse(problems)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(
            {f"{prefix}{key}": text for key, text in error.problems.items()}
        ) from None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about a mistyped key: what it is called here (`configs.words`), or the
    keys that it is close to, in whole or in the last part (`lr` to `optimizer.lr`), else those at
    the top; each after `prefix`."""
    known = sorted(known)
    word = name.rpartition(".")[2].lower()
    # What the key is called here comes before what it looks like: `epochs` resembles no key of
    # ours, and `logger` resembles one that it does not mean.
    called = [key.removeprefix(prefix) for key in WORDS.get(word, ())]
    close = [key for key in called if key in known]
    if not close:
        close = difflib.get_close_matches(name, known, n=1)
    if not close:
        # `lr` is mistyped in no letter, and only stands at the wrong place.
        last = {key: key.rpartition(".")[2] for key in known}
        best = difflib.get_close_matches(name.rpartition(".")[2], last.values(), n=1)
        close = [key for key in known if last[key] in best]
    if close:
        return "; did you mean " + " or ".join(f"'{prefix}{key}'" for key in close) + "?"
    return f"; known: {', '.join(prefix + key for key in known if '.' not in key)}"


def module_of(key: str, name: Any, package: str, known: Iterable[str]) -> ModuleType:
    """The module that a configuration names: `mlp` of a package, or `examples.vae`, wherever it is.

    Args:
      key: of the configuration, for the message.
      name: what stands there.
      package: in which names without a dot are looked up.
      known: the names that it has.

    Raises:
      ConfigError: when there is no such module. What goes wrong inside of it is not caught.
    """
    known = list(known)
    if name in known:
        return importlib.import_module(f"{package}.{name}")
    # Before it is imported: `import_module` of what is no identifier has an error of many kinds.
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError({key: f"got {show(name)}; expected the name of a module"})
    if "." not in name:
        raise ConfigError({key: f"got {show(name)}{did_you_mean(name, known)}"})
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        text = f"got {show(name)}; there is no module {error.name}: give its path from the root"
        raise ConfigError({key: text}) from None


def paths(mapping: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted paths of all keys of a nested mapping, groups and places in lists included."""
    found = []
    for key, value in mapping.items():
        found.append(f"{prefix}{key}")
        # Of a chain of optax, too, each place has a path that an override can name.
        if isinstance(value, list):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, Mapping):
            found += paths(value, f"{prefix}{key}.")
    return found


def show(value: object) -> str:
    """A value as one would write it in YAML, a group by its keys."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a group of keys ({', '.join(map(str, value))})"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _value(hint: Any, value: object, key: str) -> Any:
    """`value` as the type `hint` demands; raises ConfigError for `key` or keys below it."""
    kind, bounds, choices, nullable = _parts(hint)
    if value is None and nullable:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(kind, value, key)
    if kind is dict and isinstance(value, Mapping):
        return _group(hint, value, key)
    result = float(value) if kind is float and type(value) is int else value
    # `type() is`, for True is an int to isinstance; finite, for YAML has .inf and .nan.
    fits = type(result) is kind and result != "" and (kind is not float or math.isfinite(result))
    if fits and (choices is None or result in choices) and (bounds is None or result in bounds):
        return result
    # YAML has ways of its own to mean another type: 1e3 is a float, and an unquoted no is false.
    # Whoever is told only what was expected would not see what to change.
    text = f"got {show(value)}; expected {_expected(hint)}"
    if kind is int and type(value) is float and value.is_integer():
        text += f": write {int(value)}"
    if kind is str and choices is None and type(value) in (bool, int, float):
        text += f": quote it, '{key}=\"{value}\"'"
    if choices is not None and isinstance(value, str):
        close = difflib.get_close_matches(value, choices, n=1)
        text += f"; did you mean '{close[0]}'?" if close else ""
    raise ConfigError({key: text})


def _group(hint: Any, value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping of any keys, whose values are checked where `hint` says what they are."""
    of = typing.get_args(hint)[1] if typing.get_args(hint) else Any
    if of is Any:
        return dict(value)
    members, problems = {}, {}
    for name, member in value.items():
        try:
            members[name] = _value(of, member, f"{key}.{name}")
        except ConfigError as error:
            problems |= error.problems
    refuse(problems)
    return members


def _parts(hint: Any) -> tuple[Any, Range | None, Sequence[str] | None, bool]:
    """A field's annotation as (type, range, choices, whether null is allowed)."""
    nullable = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        nullable = types.NoneType in typing.get_args(hint)
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    bounds = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return str, bounds, typing.get_args(hint), nullable
    return typing.get_origin(hint) or hint, bounds, None, nullable


def _expected(hint: Any) -> str:
    kind, bounds, choices, nullable = _parts(hint)
    if choices:
        return "one of " + ", ".join([*choices, "null"] if nullable else choices)
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    text = names.get(kind, "a group of keys") + (f", {bounds}" if bounds else "")
    return text + (", or null" if nullable else "")
