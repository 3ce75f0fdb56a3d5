"""Reads the settings of paired modules and names those that commonly make twins differ.

    Linen  nn.LayerNorm()         epsilon 1e-06      nnx  nnx.LayerNorm(8, epsilon=1e-5)   1e-05
    "`epsilon` of LayerNorm: Linen 1e-06, nnx 1e-05, at block_7/LayerNorm_0 (nnx blocks/7/norm):
    give both the same; the defaults of the two frameworks differ for some layers"

Settings are compared by name: the fields of a Linen module, the attributes of an nnx module, and
the arguments that either is called with, which go before both. A finding is a hint: some make no
difference to a given call.
"""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from linen_nnx.infer import calls
from linen_nnx.infer.trace import place, trains
from linen_nnx.infer.twin import Twin

Settings = dict[str, Any]
Configs = tuple[dict[str, Settings], dict[str, Settings]]
"""For each side (0 Linen, 1 nnx) the settings of its modules, by path, in order of calls.

A setting `class` is the name of the module's class.
"""
_SAME = "give both the same"
_TRAIN = "pass the same flag in both calls (nnx modules start in train mode)"
_FLAGS = ("deterministic", "use_running_average", "train", "training", "is_training")
_ADVICE = {
    "epsilon": f"{_SAME}; the defaults of the two frameworks differ for some layers",
    "momentum": f"{_SAME}; only the statistics of later steps will show it",
    "use_fast_variance": f"{_SAME}; the variance rounds differently",
    "dtype": f"{_SAME}; None computes in what inputs and parameters promote to",
    "param_dtype": f"{_SAME}, or translate the checkpoint's dtype on purpose",
    "use_bias": f"{_SAME}, or `drop` the bias in the rule book on purpose",
    "use_scale": f"{_SAME}, or `drop` the scale in the rule book on purpose",
    "padding": "write the pads out in numbers; SAME depends on the stride",
    "num_heads": f"{_SAME}; the kernels' shapes do not always show it",
    "attention_fn": f"{_SAME} function: Linen's and nnx's own round differently",
    **dict.fromkeys(("activation_fn", "gate_fn"), f"{_SAME} function"),
    **dict.fromkeys(("axis", "feature_axes", "reduction_axes"), "normalise over the same axes"),
    **dict.fromkeys(
        ("strides", "kernel_size", "kernel_dilation", "input_dilation", "feature_group_count"),
        f"{_SAME}; what a layer reads, and its padding, depend on it",
    ),
    **dict.fromkeys(("precision", "num_groups", "normalize_qk", "rate", "dropout_rate"), _SAME),
    **dict.fromkeys(("broadcast_dropout", "broadcast_dims"), _SAME),
    **dict.fromkeys(_FLAGS, _TRAIN),
    "deterministic": f"dropout is on in one of them: {_TRAIN}",
    "use_running_average": f"BatchNorm is in train mode in one of them: {_TRAIN}",
}
_READ = (*_ADVICE, "promote_dtype")
# For these None is a setting. Elsewhere it means that something else decides, an argument of the
# call say, and nothing is compared.
_MAY_BE_NONE = ("dtype", "precision")


def watch(twin: Twin) -> tuple[Twin, Configs]:
    """A twin that notes the settings of its modules when it is called."""
    configs: Configs = {}, {}
    whole = calls.complete(twin, trains(twin))
    watched = replace(
        twin,
        call_linen=_watched_linen(whole.call_linen, configs[0]),
        call_nnx=_watched_nnx(whole.call_nnx, configs[1]),
    )
    return watched, configs


def _watched_linen(call_linen: Any, found: dict[str, Settings]) -> Callable[..., Any]:
    """The call of a Linen model, which notes the settings of its modules in `found`."""

    def seen(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            module = context.module
            _note(found, place(module.path), module, _given(module, args, kwargs))
        return call_next(*args, **kwargs)

    def call(*given: Any) -> Any:
        with nn.intercept_methods(seen):
            return call_linen(*given)

    return call


def _watched_nnx(call_nnx: Any, found: dict[str, Settings]) -> Callable[..., Any]:
    """The call of an nnx model, which notes the settings of its modules in `found`.

    nnx has no `intercept_methods`. So while the model runs, the `__call__` of each of its classes
    is one that notes what it is given.
    """

    def call(model: Any, *inputs: Any) -> Any:
        modules = {id(module): (place(path), module) for path, module in nnx.iter_modules(model)}
        copies: dict[type, list[Settings]] = {}

        def noting_of(own_call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(own_call)
            def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
                given = _given(self, args, kwargs)
                if id(self) in modules:
                    _note(found, *modules[id(self)], given)
                else:
                    # A transform (remat, scan, vmap) calls a copy, of which only the class is
                    # known: its flags count if those of all copies are alike.
                    flags = {**vars(self), **given}
                    known = {name: flags[name] for name in _FLAGS if name in flags}
                    copies.setdefault(type(self), []).append(known)
                return own_call(self, *args, **kwargs)

            return noting

        # A class may inherit its call: patched where it is defined, it is seen once and not twice.
        classes = {base for _, module in modules.values() for base in type(module).__mro__}
        with ExitStack() as patches:
            for base in classes:
                if inspect.isfunction(own_call := vars(base).get("__call__")):
                    noting = noting_of(own_call)
                    patches.enter_context(mock.patch.object(base, "__call__", noting))
            out = call_nnx(model, *inputs)
        for path, module in modules.values():
            first, *others = copies.get(type(module), [None])
            same = all(flags == first for flags in others)
            _note(found, path, module, first if same else None)
        return out

    return call


def _note(found: dict[str, Settings], path: str, module: Any, given: Settings | None) -> None:
    """Keeps the settings of a module at its first call.

    given: those in the arguments of the call; None if no call was seen. Then the module's own
      flags are left out, too, which the call may have overruled.
    """
    own: Settings = {}
    for name, value in vars(module).items():
        if name in _READ and not (given is None and name in _FLAGS):
            own[name] = value
    found.setdefault(path, {**own, **(given or {}), "class": type(module).__name__})


def _given(module: Any, args: Any, kwargs: Any) -> Settings:
    """The settings among the arguments of a call."""
    call = inspect.signature(type(module).__call__).bind_partial(module, *args, **kwargs)
    given: Settings = {}
    for name, value in call.arguments.items():
        # An array under such a name is data, a `padding` mask say.
        if name in _ADVICE and isinstance(value, bool | int | float | str):
            given[name] = value
    return given


def lint(configs: Configs, pairs: Mapping[tuple[str, str], str]) -> list[str]:
    """A sentence for each setting in which paired modules differ: values, where, what to do.

    Args:
      configs: the settings that `watch` has noted.
      pairs: the paths of modules that share leaves, with the dtype of what the Linen one gives.

    Example:
        >>> linen = {"norm": {"class": "LayerNorm", "epsilon": 1e-6}}
        >>> nnx_ = {"ln": {"class": "LayerNorm", "epsilon": 1e-5}}
        >>> lint((linen, nnx_), {("norm", "ln"): "float32"})[0]
        '`epsilon` of LayerNorm: Linen 1e-06, nnx 1e-05, at norm (nnx ln): give both the same; \
the defaults of the two frameworks differ for some layers'
    """
    found: dict[tuple[str, str], list[str]] = {}
    for places in dict.fromkeys([*pairs, *_ancestors(configs, pairs), *_dropouts(configs)]):
        if places[0] not in configs[0] or places[1] not in configs[1]:
            continue
        linen, nnx_ = configs[0][places[0]], configs[1][places[1]]
        for text in _differences(linen, nnx_, pairs.get(places, "")):
            found.setdefault(text, []).append(f"{places[0]} (nnx {places[1]})")
    # One sentence for all places: the same slip stands in each of twelve blocks.
    sentences = []
    for (what, advice), places in found.items():
        more = f" and {len(places) - 2} more" if len(places) > 2 else ""
        sentences.append(f"{what}, at {', '.join(places[:2])}{more}: {advice}")
    return sentences


def _differences(linen: Settings, nnx_: Settings, dtype: str) -> Iterator[tuple[str, str]]:
    """What differs, and what to do."""
    rates = [side.get("rate", side.get("dropout_rate")) for side in (linen, nnx_)]
    for name, advice in _ADVICE.items():
        if name not in linen or name not in nnx_:
            continue
        # A dropout of rate 0 is the same, on or off.
        if name == "deterministic" and rates == [0, 0]:
            continue
        ours, theirs = _plain(name, linen), _plain(name, nnx_)
        if name == "dtype" and dtype:
            # None has computed in the dtype that came out, too.
            ours, theirs = ours or dtype, theirs or dtype
        is_unset = (ours is None or theirs is None) and name not in _MAY_BE_NONE
        if ours != theirs and not is_unset:
            shown = f"Linen {_shown(linen[name])}, nnx {_shown(nnx_[name])}"
            yield f"`{name}` of {linen['class']}: {shown}", advice
    is_norm = "epsilon" in nnx_ and nnx_.get("promote_dtype") is promote_dtype
    if is_norm and dtype in ("bfloat16", "float16"):
        what = f"promotion in {nnx_['class']}: nnx casts to {dtype} first, Linen takes statistics"
        yield (
            f"{what} of float32",
            "construct it with `promote_dtype=lambda arrays, dtype=None: arrays`",
        )


def _ancestors(configs: Configs, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The modules around paired ones, where the two models are nested in the same way.

    An attention holds no leaves itself, and its `num_heads` counts: its `query` is paired, and
    `block_3/attention/query` with `blocks/3/mha/query` makes a pair of what is around them.
    """
    around: dict[tuple[str, str], tuple[str, str]] = {}
    for linen, nnx_ in pairs:
        while "/" in linen and "/" in nnx_:
            linen, nnx_ = linen.rpartition("/")[0], nnx_.rpartition("/")[0]
            if linen not in configs[0] or nnx_ not in configs[1]:
                break
            around[linen, nnx_] = re.sub(r"\d+", "*", linen), re.sub(r"\d+", "*", nnx_)
    # Nested in the same way: each pattern (`block_*/attention`) has one partner in all layers.
    patterns = set(around.values())
    of_linen = Counter(linen for linen, _ in patterns)
    of_nnx = Counter(nnx_ for _, nnx_ in patterns)
    for places, (linen, nnx_) in around.items():
        if of_linen[linen] == of_nnx[nnx_] == 1:
            yield places


def _dropouts(configs: Configs) -> Iterator[tuple[str, str]]:
    """Dropout layers: in the order of their calls, or each with one, if those are all alike."""
    linen, nnx_ = map(_dropouts_of, configs)
    if len(linen) == len(nnx_):
        yield from zip(linen, nnx_, strict=True)
        return
    # An nnx model may keep one Dropout and call it everywhere.
    first = next(iter(linen), None)
    if first is not None and all(settings == linen[first] for settings in linen.values()):
        for path in nnx_:
            yield first, path


def _dropouts_of(side: dict[str, Settings]) -> dict[str, Settings]:
    return {path: settings for path, settings in side.items() if settings["class"] == "Dropout"}


def _plain(name: str, settings: Settings) -> Any:
    """A setting in a form in which equal means equal."""
    value = settings[name]
    if name in ("dtype", "param_dtype"):
        return None if value is None else jnp.dtype(value).name
    if name in ("strides", "kernel_dilation", "input_dilation"):
        value = 1 if value is None else value
    if name == "padding":
        return _pads(value, settings)
    if callable(value):
        # jax.jit around a function is the function.
        return getattr(value, "__wrapped__", value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        # (1, 1) and 1 are the same strides.
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _pads(value: Any, settings: Settings) -> Any:
    """Padding in numbers, where the input's shape does not matter."""
    size = settings.get("kernel_size")
    sizes = [size] if isinstance(size, int) else list(size or ())
    dilation = _plain("kernel_dilation", settings) if "kernel_dilation" in settings else 1
    if isinstance(value, int):
        return [(value, value)] * len(sizes)
    if value == "VALID":
        return [(0, 0)] * len(sizes)
    # With a stride, SAME pads as the input's size leaves over.
    if value == "SAME" and _plain("strides", settings) == 1 and isinstance(dilation, int):
        total = [(size - 1) * dilation for size in sizes]
        return [(each // 2, each - each // 2) for each in total]
    if isinstance(value, str):
        return value
    return [(each, each) if isinstance(each, int) else tuple(each) for each in value]


def _shown(value: Any) -> str:
    """A setting as people write it: `bfloat16`, `faults.sharp_attention`, `(1, 1)`."""
    # `jnp.bfloat16` is no type, but an object of a private class of jax.
    if isinstance(value, type) or type(value).__name__ == "_ScalarMeta":
        return jnp.dtype(value).name
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if callable(value) and name else repr(value)
