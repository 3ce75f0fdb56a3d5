"""Optax transformations by name, from plain values as YAML has them.

    chain: [{clip: {max_delta: 1.0}}, {adamw: {b1: 0.8}}]

is `optax.clip(max_delta=1.0)`, then `optax.adamw(learning_rate=SCHEDULE, b1=0.8, mask=MATRICES)`,
with the run's own schedule and mask. An entry is a name, a name with its arguments, or a list of
entries, which is a chain of its own. Every factory of `optax` and `optax.contrib` can be named. Its
signature says which arguments there are, and of which types. An argument may be an entry itself
(`{apply_if_finite: {inner: adam, max_consecutive_errors: 3}}`) or a schedule of optax
(`{sgd: {learning_rate: {exponential_decay: {...}}}}`).
"""

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from configs.build import ConfigError, did_you_mean, refuse, show

T = TypeVar("T")
Factory = Callable[..., Any]
Mask = Callable[[Any], Any]
Transformation = optax.GradientTransformation

# What these compute is not elementwise, and so depends on how a stage names and stacks leaves: in
# their roundings, or where a leaf is a stack, wholly. Measured: docs/optimizers.md.
SUMS = {
    "dadapt_adamw", "dog", "dowg", "lbfgs", "mechanize", "momo", "momo_adam", "normalize",
    "normalize_by_update_norm", "polyak_sgd", "prodigy", "sam", "scale_by_lbfgs",
    "scale_by_polyak",
}  # fmt: skip
WHOLE = {
    "adafactor", "adaptive_grad_clip", "centralize", "clip_by_block_rms", "fromage", "galore",
    "lamb", "lars", "muon", "novograd", "scale_by_distance_over_gradients",
    "scale_by_factored_rms", "scale_by_galore", "scale_by_muon", "scale_by_novograd",
    "scale_by_param_block_norm", "scale_by_param_block_rms", "scale_by_sm3",
    "scale_by_trust_ratio", "sm3",
}  # fmt: skip
DRAWS = {"add_noise", "differentially_private_aggregate", "dpsgd", "noisy_sgd"}
UNANNOTATED = ("dog", "dowg", "scale_by_factored_rms")  # factories that do not say what they return
EXAMPLE = "{adamw: {b1: 0.8}}"


@dataclass(frozen=True)
class Surroundings:
    """What a chain takes from the run around it.

    Attributes:
        schedule: the learning rate, a function of the number of updates done.
        masks: by name, which parameters: a function of the parameters that gives a tree of bool.
            "matrices" is among them, for weight decay.
        named: the same for a list of names of leaves, as `[kernel]`.
        norm: the Euclidean norm of all updates, alike however the leaves are named.
    """

    schedule: Callable[[Any], Any]
    masks: Mapping[str, Mask]
    named: Callable[[list[str]], Mask]
    norm: Callable[[Any], jax.Array]


def build(
    chain: list[Any], around: Surroundings, at: str = "optimizer.chain"
) -> list[Transformation]:
    """The transformations that a chain names, in its order.

    Args:
        chain: entries, see the module's docstring.
        around: what the factories get beside their arguments.
        at: dotted key of the chain in the configuration, for the messages.

    Raises:
        configs.build.ConfigError: naming each entry and argument that is unknown, missing or wrong.

    >>> masks = {"matrices": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)}
    >>> around = Surroundings(lambda count: 0.1, masks, masks.get, optax.tree.norm)
    >>> len(build([{"clip": {"max_delta": 1.0}}, "adam"], around))
    2
    >>> build([{"adamw": {"beta": 0.9}}], around)
    Traceback (most recent call last):
    configs.build.ConfigError: The configuration has a problem:
      optimizer.chain.0.adamw.beta: unknown argument; known: b1, b2, eps, eps_root, ...
    """
    made = _each(functools.partial(_entry, around=around, top=True), _numbered(at, chain))
    rates = [(key, entry) for key, entry in _numbered(at, chain) if takes_rate(entry)]
    if len(rates) > 1 and not any("masked" in entry for _, entry in rates):
        (first, _), (second, _) = rates[:2]
        refuse(
            {
                second: f"applies the learning rate a second time, after {first}: name its "
                "scale_by_... instead, or put each into a `masked`"
            }
        )
    return made


def takes_rate(entry: Any) -> bool:
    """Whether an entry, or one among its arguments, applies the learning rate itself.

    >>> takes_rate({"adamw": {"b1": 0.8}}), takes_rate("scale_by_adam")
    (True, False)
    """
    if isinstance(entry, list):
        return any(map(takes_rate, entry))
    name, given = _parted(entry)
    if name not in factories():
        return False
    itself = "learning_rate" in inspect.signature(factories()[name]).parameters
    return itself or any(map(takes_rate, given.values()))


def own_rate(chain: list[Any], around: Surroundings) -> Callable[[Any], Any] | None:
    """The learning rate that a chain gives one of its factories itself, the first if several.

    >>> masks = {"matrices": lambda params: params}
    >>> around = Surroundings(lambda count: 0.1, masks, masks.get, optax.tree.norm)
    >>> own_rate([{"clip": {"max_delta": 1.0}}, {"sgd": {"learning_rate": 0.5}}], around)(7)
    0.5
    """
    for entry in chain:
        name, given = (None, {}) if isinstance(entry, list) else _parted(entry)
        if name in factories() and given.get("learning_rate") is not None:
            parameter = inspect.signature(factories()[name]).parameters["learning_rate"]
            rate = _argument(f"{name}.learning_rate", parameter, given["learning_rate"], around)
            return rate if callable(rate) else optax.constant_schedule(rate)
        inside = own_rate(entry if isinstance(entry, list) else list(given.values()), around)
        if inside is not None:
            return inside
    return None


def names(chain: list[Any]) -> list[str]:
    """The factories that a chain names, those among its arguments included, in order.

    >>> names([{"apply_if_finite": {"inner": ["adam"], "max_consecutive_errors": 3}}])
    ['apply_if_finite', 'adam']
    """
    found = []
    for entry in chain:
        if isinstance(entry, list):
            found += names(entry)
            continue
        name, given = _parted(entry)
        if name in factories():
            found += [name, *names(list(given.values()))]
    return found


def depending_on_stage(chain: list[Any]) -> dict[str, str]:
    """The factories of a chain whose updates are not the same bits at every stage, with the reason.

    >>> depending_on_stage(["adam", "muon"])
    {'muon': 'looks at each leaf as a whole, which at another stage may be a stack'}
    """
    reasons = {
        "adds up over all leaves, in the order of their names": SUMS,
        "looks at each leaf as a whole, which at another stage may be a stack": WHOLE,
        "draws noise for one leaf after another, in the order of their names": DRAWS,
    }
    found = {}
    for name in names(chain):
        for reason, those in reasons.items():
            if name in those:
                found[name] = reason
    return found


@functools.cache
def factories() -> dict[str, Factory]:
    """The functions of `optax` and `optax.contrib` that return one transformation, by name."""
    found = {}
    for module in (optax.contrib, optax):
        for name, value in vars(module).items():
            is_function = isinstance(value, (types.FunctionType, functools.partial))
            if not is_function or name.startswith("_"):
                continue
            signature = inspect.signature(value)
            returned = getattr(signature.return_annotation, "__name__", "")
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            # Not `chain(*args)`: here a list is a chain.
            if inspect.Parameter.VAR_POSITIONAL in kinds:
                continue
            if returned.startswith("GradientTransformation") or name in UNANNOTATED:
                found[name] = value
    return found


@functools.cache
def schedules() -> dict[str, Factory]:
    """The schedules of optax by name."""
    found = {}
    for name, value in vars(optax.schedules).items():
        if name.endswith(("_schedule", "_decay")):
            found[name] = value
    return found


def clip_by_norm(max_norm: float, norm: Callable[[Any], jax.Array]) -> Transformation:
    """`optax.clip_by_global_norm` with a norm that does not depend on the order of names."""

    def clip(updates: Any, params: Any = None) -> Any:
        size = norm(updates)
        scale = jnp.where(size < max_norm, 1.0, max_norm / size)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)

    return optax.stateless(clip)


def _entry(key: str, entry: Any, around: Surroundings, top: bool = False) -> Transformation:
    """One entry; `top` tells that it acts on all updates, and not on those of some mask."""
    if isinstance(entry, list):
        make = functools.partial(_entry, around=around, top=top)
        return optax.chain(*_each(make, _numbered(key, entry)))
    name, given = _parted(entry)
    if name is None:
        text = f"got {show(entry)}; expected a transformation with its arguments, as {EXAMPLE}"
        raise ConfigError({key: text})
    if name not in factories():
        close = difflib.get_close_matches(name, factories(), n=1)
        hint = did_you_mean(name, close) if close else "; docs/optimizers.md lists them"
        text = f"got '{name}', which is no transformation of optax or optax.contrib{hint}"
        raise ConfigError({key: text})
    key = f"{key}.{name}"
    if name == "sam":  # which fails on `value`, though its type says that it takes it
        made = _call(key, factories()[name], given, around)
        return optax.GradientTransformation(made.init, made.update)
    if name != "clip_by_global_norm":
        return _call(key, factories()[name], given, around)
    if not top:
        text = "here its norm would depend on the names of a stage: put it into the chain itself"
        raise ConfigError({key: text})
    return clip_by_norm(**_arguments(key, factories()[name], given, around), norm=around.norm)


def _call(key: str, factory: Factory, given: Mapping[str, Any], around: Surroundings) -> Any:
    arguments = _arguments(key, factory, given, around)
    try:
        return factory(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError({key: f"optax refuses it: {str(error).splitlines()[0]}"}) from None


def _arguments(
    key: str, factory: Factory, given: Mapping[str, Any], around: Surroundings
) -> dict[str, Any]:
    """What a factory is called with: the given arguments, and those that the run has for it."""
    parameters = inspect.signature(factory).parameters
    arguments: dict[str, Any] = {}
    problems = {}
    rate = parameters.get("learning_rate")
    if rate is not None and "Callable" in _kinds(rate)[0]:
        arguments["learning_rate"] = around.schedule
    elif rate is not None and "learning_rate" not in given:
        text = "missing; expected a number, for it takes no schedule: optimizer.lr has no effect"
        problems[f"{key}.learning_rate"] = text
    for name in ("mask", "weight_decay_mask"):
        # Which weights decay must not depend on how a stage stacks them.
        if name in parameters and parameters[name].default is not inspect.Parameter.empty:
            arguments[name] = around.masks["matrices"]
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in {*given, *arguments}:
            text = f"missing; expected {_expected(parameter, around)}"
            problems.setdefault(f"{key}.{name}", text)
    for name, value in given.items():
        if name not in parameters:
            problems[f"{key}.{name}"] = "unknown argument" + did_you_mean(name, parameters)
            continue
        try:
            arguments[name] = _argument(f"{key}.{name}", parameters[name], value, around)
        except ConfigError as error:
            problems |= error.problems
    refuse(problems)
    return arguments


def _argument(key: str, parameter: inspect.Parameter, value: Any, around: Surroundings) -> Any:
    """A value of the YAML as the argument that the parameter's annotation asks for."""
    kinds, choices = _kinds(parameter)
    if value is None and (parameter.default is None or "NoneType" in kinds):
        return None
    if _is_mask(parameter) and isinstance(value, str) and value in around.masks:
        return around.masks[value]
    if _is_mask(parameter) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        try:
            return around.named(value)
        except ConfigError as error:
            refuse({f"{key}{at}": text for at, text in error.problems.items()})
    if _is_transformation(kinds) and value is not None:
        return _entry(key, value, around)
    if "Callable" in kinds and isinstance(value, Mapping) and value.keys() <= schedules().keys():
        ((name, given),) = value.items()
        return _call(f"{key}.{name}", schedules()[name], given, around)
    if value in choices if choices else _fits(value, kinds):
        return _tuples(value)
    raise ConfigError({key: f"got {show(value)}; expected {_expected(parameter, around)}"})


def _fits(value: Any, kinds: set[str]) -> bool:
    """Whether a plain value is of one of the types."""
    if isinstance(value, Mapping):
        return "Mapping" in kinds and "float" not in kinds
    if not kinds or kinds == {"Any", "NoneType"}:  # the dtypes: optax itself looks at them
        return True
    if isinstance(value, bool):
        # What may be an array may be a bool as well, and yet a number is meant.
        return "bool" in kinds and "float" not in kinds
    fitting = {int: {"int", "float"}, float: {"float"}, str: {"str"}, list: {"tuple"}}
    return not kinds.isdisjoint(fitting.get(type(value), ()))


def _expected(parameter: inspect.Parameter, around: Surroundings) -> str:
    kinds, choices = _kinds(parameter)
    if choices:
        return "one of " + ", ".join(choices)
    if _is_mask(parameter):
        return f"one of {', '.join(around.masks)}; or a list of names of leaves, as [kernel]"
    words = {
        f"a transformation, as {EXAMPLE}": _is_transformation(kinds),
        "a number": "float" in kinds,
        "a schedule, as {exponential_decay: {...}}": _may_be_schedule(parameter, kinds),
        "a whole number": "int" in kinds and "float" not in kinds,
        "true or false": kinds == {"bool"},
        "text": "str" in kinds,
        "a list": "tuple" in kinds,
        "null": "NoneType" in kinds,
    }
    said = [word for word, holds in words.items() if holds]
    return " or ".join(said) or "what no YAML can hold: leave it out, or write a Python function"


def _kinds(parameter: inspect.Parameter) -> tuple[set[str], list[str]]:
    """The names of the types that an annotation allows, and the values of a Literal.

    >>> _kinds(inspect.signature(optax.sgd).parameters["nesterov"])
    ({'bool'}, [])
    """
    kinds: set[str] = set()
    choices: list[str] = []
    waiting = [] if parameter.annotation is parameter.empty else [parameter.annotation]
    while waiting:
        hint = waiting.pop()
        origin = typing.get_origin(hint) or hint
        if origin in (typing.Union, types.UnionType):
            waiting += typing.get_args(hint)
        elif origin is typing.Literal:
            choices += typing.get_args(hint)
        else:
            kinds.add(getattr(origin, "__name__", str(origin)))
    return kinds, choices


def _may_be_schedule(parameter: inspect.Parameter, kinds: set[str]) -> bool:
    return "Callable" in kinds and ("float" in kinds or parameter.name == "step_size_fn")


def _is_mask(parameter: inspect.Parameter) -> bool:
    return parameter.name.endswith("mask")


def _is_transformation(kinds: set[str]) -> bool:
    return any(kind.startswith("GradientTransformation") for kind in kinds)


def _parted(entry: Any) -> tuple[str | None, Mapping[str, Any]]:
    """An entry as its name and arguments; no name where it is none."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, given),) = entry.items()
        if given is None or isinstance(given, Mapping):
            return str(name), given or {}
    return None, {}


def _numbered(key: str, entries: list[Any]) -> Iterator[tuple[str, Any]]:
    for index, entry in enumerate(entries):
        yield f"{key}.{index}", entry


def _tuples(value: Any) -> Any:
    """Lists as the tuples that optax has in their place."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _each(make: Callable[[str, Any], T], items: Iterable[tuple[str, Any]]) -> list[T]:
    """`make(key, item)` of each; the problems of all of them in one error."""
    made: list[T] = []
    problems: dict[str, str] = {}
    for key, item in items:
        try:
            made.append(make(key, item))
        except ConfigError as error:
            problems |= error.problems
    refuse(problems)
    return made
