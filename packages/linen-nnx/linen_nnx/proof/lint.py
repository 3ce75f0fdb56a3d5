"""Reads the configuration of paired modules and names what commonly makes twins differ.

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

A setting `kind` is the name of the module's class.
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
_MAY_BE_NONE = ("dtype", "precision")  # elsewhere None means that something else decides


def _note(found: dict[str, Settings], path: str, module: Any, given: Settings | None) -> None:
    """Keeps the settings of a module at its first call; `given` in it, None if it was not seen."""
    skipped = _FLAGS if given is None else ()
    own = {k: v for k, v in vars(module).items() if k in _READ and k not in skipped}
    found.setdefault(path, {**own, **(given or {}), "kind": type(module).__name__})


def _given(module: Any, args: Any, kwargs: Any) -> Settings:
    """The settings among the arguments of a call."""
    call = inspect.signature(type(module).__call__).bind_partial(module, *args, **kwargs)
    plain = {k: v for k, v in call.arguments.items() if isinstance(v, bool | int | float | str)}
    return {name: value for name, value in plain.items() if name in _ADVICE}


def watch(twin: Twin) -> tuple[Twin, Configs]:
    """A twin that notes the settings of its modules when it is called."""
    configs: Configs = {}, {}
    whole = calls.complete(twin, trains(twin))
    call_linen: Any = whole.call_linen
    call_nnx: Any = whole.call_nnx

    def linen(*given: Any) -> Any:
        def seen(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "__call__":
                module = context.module
                _note(configs[0], place(module.path), module, _given(module, args, kwargs))
            return call_next(*args, **kwargs)

        with nn.intercept_methods(seen):
            return call_linen(*given)

    def call_of_nnx(model: Any, *inputs: Any) -> Any:
        modules = {id(m): (place(path), m) for path, m in nnx.iter_modules(model)}

        def seen(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
                given = _given(self, args, kwargs)
                if id(self) in modules:
                    _note(configs[1], *modules[id(self)], given)
                else:  # a copy that a transform (remat, scan, vmap) has made
                    flags = {**vars(self), **given}
                    copies.setdefault(type(self), []).append(
                        {name: flags[name] for name in _FLAGS if name in flags}
                    )
                return call(self, *args, **kwargs)

            return noting

        copies: dict[type, list[Settings]] = {}
        kinds = {kind for _, module in modules.values() for kind in type(module).__mro__}
        with ExitStack() as patches:
            for kind in kinds:
                if inspect.isfunction(call := vars(kind).get("__call__")):
                    patches.enter_context(mock.patch.object(kind, "__call__", seen(call)))
            out = call_nnx(model, *inputs)
        for path, module in modules.values():
            first, *others = copies.get(type(module), [None])
            same = all(flags == first for flags in others)
            _note(configs[1], path, module, first if same else None)
        return out

    return replace(twin, call_linen=linen, call_nnx=call_of_nnx), configs


def lint(configs: Configs, pairs: Mapping[tuple[str, str], str]) -> list[str]:
    """A sentence for each setting in which paired modules differ: values, where, what to do.

    pairs: the paths of modules that share leaves, with the dtype of what the Linen one gives.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for places in dict.fromkeys([*pairs, *_ancestors(configs, pairs), *_dropouts(configs)]):
        if places[0] not in configs[0] or places[1] not in configs[1]:
            continue
        linen, nnx_ = (side[path] for side, path in zip(configs, places, strict=True))
        for text in _differences(linen, nnx_, pairs.get(places, "")):
            found.setdefault(text, []).append(f"{places[0]} (nnx {places[1]})")
    sentences = []
    for (what, advice), places in found.items():
        more = f" and {len(places) - 2} more" if len(places) > 2 else ""
        sentences.append(f"{what}, at {', '.join(places[:2])}{more}: {advice}")
    return sentences


def _differences(linen: Settings, nnx_: Settings, dtype: str) -> Iterator[tuple[str, str]]:
    """What differs, and what to do."""
    rates = [side.get("rate", side.get("dropout_rate")) for side in (linen, nnx_)]
    for name, advice in _ADVICE.items():
        if name not in linen or name not in nnx_ or (name == "deterministic" and rates == [0, 0]):
            continue
        values = [_plain(name, side) for side in (linen, nnx_)]
        if name == "dtype" and dtype:  # None computed in that, too
            values = [value or dtype for value in values]
        unset = None in values and name not in _MAY_BE_NONE
        if values[0] != values[1] and not unset:
            shown = [_shown(side[name]) for side in (linen, nnx_)]
            yield f"`{name}` of {linen['kind']}: Linen {shown[0]}, nnx {shown[1]}", advice
    is_norm = "epsilon" in nnx_ and nnx_.get("promote_dtype") is promote_dtype
    if is_norm and dtype in ("bfloat16", "float16"):
        what = f"promotion in {nnx_['kind']}: nnx casts to {dtype} first, Linen takes statistics of"
        yield (
            f"{what} float32",
            "construct it with `promote_dtype=lambda arrays, dtype=None: arrays`",
        )


def _ancestors(configs: Configs, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The modules around paired ones, where the two models are nested in the same way."""
    kinds: dict[tuple[str, str], tuple[str, ...]] = {}
    for linen, nnx_ in pairs:
        while "/" in linen and "/" in nnx_:
            linen, nnx_ = linen.rpartition("/")[0], nnx_.rpartition("/")[0]
            if linen not in configs[0] or nnx_ not in configs[1]:
                break
            kinds[linen, nnx_] = tuple(re.sub(r"\d+", "*", path) for path in (linen, nnx_))
    counts = [Counter(kind[side] for kind in set(kinds.values())) for side in (0, 1)]
    for places, kind in kinds.items():
        if counts[0][kind[0]] == counts[1][kind[1]] == 1:
            yield places


def _dropouts(configs: Configs) -> Iterator[tuple[str, str]]:
    """Dropout layers: in the order of their calls, or each with one, if those are all alike."""
    linen, nnx_ = (
        {path: settings for path, settings in side.items() if settings["kind"] == "Dropout"}
        for side in configs
    )
    if len(linen) == len(nnx_):
        yield from zip(linen, nnx_, strict=True)
    elif linen and all(settings == next(iter(linen.values())) for settings in linen.values()):
        yield from ((next(iter(linen)), path) for path in nnx_)


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
        return getattr(value, "__wrapped__", value)
    if isinstance(value, Sequence) and not isinstance(value, str):
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
    if value == "SAME" and _plain("strides", settings) == 1 and isinstance(dilation, int):
        total = [(size - 1) * dilation for size in sizes]
        return [(each // 2, each - each // 2) for each in total]
    if isinstance(value, str):
        return value
    return [(each, each) if isinstance(each, int) else tuple(each) for each in value]


def _shown(value: Any) -> str:
    if isinstance(value, type) or type(value).__name__ == "_ScalarMeta":
        return jnp.dtype(value).name
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if callable(value) and name else repr(value)
