"""The four stages of a migration behind one functional interface.

    stage = Stage("nnx_in_linen", family, inputs)
    variables = stage.init(key)
    outputs, updates = stage.apply(variables, inputs, train=True, key=key)

`variables` is `{collection: {"encoder": nested dict, "head": nested dict}}` of arrays, with string
keys throughout (list indices are digits): a plain pytree, the same kind at every stage. Only the
names inside a half differ, by the framework which that half is written in.

What the bridge accepts in silence is refused here: before variables are applied they are compared
with the stage's own abstract tree, while tracing and so at no cost per step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.nnx import bridge
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from linen_nnx import RuleBook
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.errors import Refusal
from model.families import Family
from model.shared import Key, fold

Variables = dict[str, Any]
Leaves = dict[str, Any]


class Form(NamedTuple):
    """Which framework the root and each half of a stage is written in: "linen" or "nnx"."""

    root: str
    encoder: str
    head: str


STAGES: dict[str, Form] = {
    "linen": Form("linen", "linen", "linen"),
    "nnx_in_linen": Form("linen", "nnx", "linen"),
    "linen_in_nnx": Form("nnx", "nnx", "linen"),
    "nnx": Form("nnx", "nnx", "nnx"),
}
HALVES = ("encoder", "head")


class VariablesError(Refusal):
    """Variables that do not fit the stage they are given to; the message lists every difference."""


class Stage:
    """A family's model at one stage of the migration.

    Attributes:
        name: a key of `STAGES`.
        family: the model family with its options.
        inputs: shape and dtype of the example batch.
        abstract: `{"collection/half/path": jax.ShapeDtypeStruct}`, the leaves that `apply` demands.
        mutable: the collections that training updates beside the parameters, sorted.
    """

    def __init__(
        self, name: str, family: Family, inputs: jax.ShapeDtypeStruct | Array | np.ndarray
    ) -> None:
        """Builds the stage without computing anything.

        Args:
            name: a key of `STAGES`.
            family: see `model.families.create`.
            inputs: one batch of model inputs, or its shape and dtype; any batch size will do later.

        Raises:
            ValueError: when a half keeps state that the bridge would lose.
        """
        self.name = name
        self.family = family
        form = STAGES[name]
        self.inputs = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        root = _LinenRoot if form.root == "linen" else _NnxRoot
        self._root = root(family, form, self.inputs)
        self.abstract: Leaves = self._root.abstract
        self.mutable = sorted({path.split("/")[0] for path in self.abstract} - {"params"})

    def init(self, key: Array) -> Variables:
        """The stage's own initial variables from `key` (typed); see `training.state` for
        parameters that are alike at every stage."""
        return unflatten(jax.jit(self._root.init)(key))

    def apply(
        self, variables: Mapping[str, Any], inputs: Array, *, train: bool, key: Key = None
    ) -> tuple[Array, Variables]:
        """Runs the model; call it under `jax.jit`.

        Args:
            variables: as `init` returns them.
            inputs: one batch of model inputs, (batch, ...).
            train: dropout on, batch statistics updated.
            key: the typed dropout key of this step; needed if `train`, unused otherwise.

        Returns:
            The outputs and, if `train`, every collection beside the parameters, updated.

        Raises:
            VariablesError: when variables and stage differ, naming each difference.
            ValueError: when `train` and no key is given.
        """
        if train and key is None:
            raise ValueError("apply(train=True) needs the dropout key of this step; got key=None.")
        leaves = flatten(variables)
        check(leaves, self.abstract, f"stage {self.name!r}")
        outputs, updates = self._root.apply(
            leaves, inputs, train, key if train else None, self.mutable if train else []
        )
        return outputs, unflatten(updates)


class _Hybrid(nn.Module):
    """The Linen root: an encoder and a head that is lent some of the encoder's arrays."""

    encoder: nn.Module
    head: nn.Module

    def __call__(self, inputs: Array, *, train: bool, key: Key) -> Array:
        features, shared = self.encoder(inputs, train=train, key=fold(key, 0))
        return self.head(features, shared, train=train, key=fold(key, 1))


class _LinenRoot:
    """Stages `linen` and `nnx_in_linen`: a Linen root, with the encoder as it is or bridged."""

    def __init__(self, family: Family, form: Form, inputs: jax.ShapeDtypeStruct) -> None:
        head = family.twin("linen").Head(family.cfg)
        encoder = family.twin(form.encoder).Encoder
        if form.encoder == "nnx":
            # Given the class, the bridge would run its constructor, random init and all, on every
            # trace, only to overwrite each leaf. To apply, an abstract skeleton is enough.
            graphdef, state = _abstract(lambda: encoder(family.cfg, rngs=nnx.Rngs(0)))
            bridged = bridge.to_linen(
                lambda: nnx.merge(graphdef, state, copy=True), skip_rng=True, metadata_fn=None
            )
            fresh = bridge.to_linen(encoder, family.cfg, metadata_fn=None)
            self._module, self._to_init = _Hybrid(bridged, head), _Hybrid(fresh, head)
        else:
            self._module = self._to_init = _Hybrid(encoder(family.cfg), head)
        self._inputs = inputs
        variables: Any = jax.eval_shape(self._init, jax.random.key(0))
        self.abstract: Leaves = flatten(variables)
        # Which, unlike the names, tell the integers that `nnx.List` has for keys from their digits.
        self._paths = dict(zip(self.abstract, flatten_dict(variables), strict=True))

    def _init(self, key: Array) -> Variables:
        inputs = jax.numpy.zeros(self._inputs.shape, self._inputs.dtype)
        return nn.unbox(self._to_init.init({"params": key}, inputs, train=False, key=None))

    def init(self, key: Array) -> Leaves:
        return flatten(self._init(key))

    def apply(
        self, leaves: Leaves, inputs: Array, train: bool, key: Key, mutable: list[str]
    ) -> tuple[Array, Leaves]:
        variables = unflatten_dict({self._paths[name]: leaf for name, leaf in leaves.items()})
        result: Any = self._module.apply(
            variables, inputs, train=train, key=key, mutable=mutable or False
        )
        if not mutable:
            return result, {}
        outputs, updates = result
        return outputs, flatten(updates)


class _NnxHybrid(nnx.Module):
    """The nnx root: an encoder and a head that is lent some of the encoder's arrays."""

    def __init__(self, encoder: nnx.Module, head: nnx.Module) -> None:
        self.encoder = encoder
        self.head = head

    def __call__(self, inputs: Array, *, train: bool, key: Key, mutable: list[str]) -> Array:
        features, shared = self.encoder(inputs, train=train, key=fold(key, 0))
        # A Linen head loses the updates of its collections unless told which are mutable.
        extra = {"mutable": mutable} if mutable and isinstance(self.head, bridge.ToNNX) else {}
        return self.head(features, shared, train=train, key=fold(key, 1), **extra)


class _NnxRoot:
    """Stages `linen_in_nnx` and `nnx`: an nnx root, with the head bridged or as it is."""

    def __init__(self, family: Family, form: Form, inputs: jax.ShapeDtypeStruct) -> None:
        self._family, self._form, self._inputs = family, form, inputs
        self._graphdef, self._state = _abstract(self._create)
        self.abstract = _leaves(self._state)

    def _create(self, key: Key = None) -> _NnxHybrid:
        rngs = nnx.Rngs(0 if key is None else key)
        cfg = self._family.cfg
        encoder = self._family.twin("nnx").Encoder(cfg, rngs=rngs)
        head = self._family.twin(self._form.head).Head
        if self._form.head == "nnx":
            return _NnxHybrid(encoder, head(cfg, rngs=rngs))
        bridged = bridge.ToNNX(head(cfg), rngs=rngs)
        model = _NnxHybrid(encoder, bridged)
        # Before lazy_init a bridged Linen module has no parameters, and nothing would say so.
        inputs = jax.numpy.zeros(self._inputs.shape, self._inputs.dtype)
        bridge.lazy_init(model, inputs, train=False, key=None, mutable=[])
        bridged.to_nnx__rngs = None
        return model

    def init(self, key: Array) -> Leaves:
        return _leaves(nnx.state(self._create(key)))

    def apply(
        self, leaves: Leaves, inputs: Array, train: bool, key: Key, mutable: list[str]
    ) -> tuple[Array, Leaves]:
        flat = zip(self.abstract, nnx.to_flat_state(self._state), strict=True)
        state = nnx.from_flat_state(
            [(path, leaf.replace(leaves[name])) for name, (path, leaf) in flat]
        )
        model = nnx.merge(self._graphdef, state)
        outputs = model(inputs, train=train, key=key, mutable=mutable)
        if not mutable:
            return outputs, {}
        return outputs, _leaves(nnx.state(model, nnx.Not(nnx.Param)))


def translate(leaves: Mapping[str, Any], rules: RuleBook, source: str, target: str) -> Leaves:
    """Renames and reshapes the leaves of one stage's variables to those of another.

    Args:
        leaves: `{"collection/half/path": array or tracer}` at stage `source`.
        rules: the rule book of the family, or of the collections at hand; it must be invertible.
        source, target: keys of `STAGES`.

    Raises:
        linen_nnx.RuleError: when the leaves do not fit the rules, naming each mismatch.
    """
    result: Leaves = {}
    for half in HALVES:
        part = {path: leaf for path, leaf in leaves.items() if path.split("/")[1] == half}
        before, after = getattr(STAGES[source], half), getattr(STAGES[target], half)
        if before == after:
            result |= part
        elif after == "nnx":
            result |= _to_nnx(part, rules.within(half))
        else:
            nnx_leaves = {path.split("/", 1)[1]: leaf for path, leaf in part.items()}
            result |= rules.within(half).to_linen(nnx_leaves)
    return result


def _to_nnx(leaves: Leaves, rules: RuleBook) -> Leaves:
    """Linen leaves to nnx leaves, each put under the collection that its source came from."""
    result: Leaves = {}
    for step in rules.plan(leaves, to="nnx").steps:
        collection = step.sources[0].split("/")[0]
        arrays = step.run([leaves[path] for path in step.sources])
        paths = [f"{collection}/{path}" for path in step.targets]
        result |= zip(paths, arrays, strict=True)
    return result


def check(leaves: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises `VariablesError` naming every missing, unexpected or misshapen leaf.

    Args:
        leaves: `{path: array or tracer}`, what was got.
        expected: `{path: object with shape and dtype}`.
        where: what the leaves are for, to be named in the message.
    """
    problems = [
        f"  missing     {path}: expected {_spec(spec)}"
        for path, spec in expected.items()
        if path not in leaves
    ]
    for path, leaf in leaves.items():
        if path not in expected:
            problems.append(f"  unexpected  {path}: got {_spec(leaf)}")
        elif _spec(leaf) != _spec(expected[path]):
            problems.append(
                f"  mismatch    {path}: got {_spec(leaf)}, expected {_spec(expected[path])}"
            )
    if problems:
        raise VariablesError(
            f"The variables do not fit {where} ({len(problems)} differences):\n"
            + "\n".join(problems)
            + "\nIf they come from another stage, translate them first (convert.py run --to STAGE)."
        )


def _spec(leaf: Any) -> str:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"a {type(leaf).__name__}, not an array"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _abstract(create: Any) -> tuple[Any, Any]:
    """Graphdef and abstract state of an nnx module; refuses state that the bridge would lose."""
    graphdef, state = nnx.split(nnx.eval_shape(create))
    problems = []
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        if not isinstance(leaf, nnx.Variable):
            problems.append(f"{name} is a bare array: the bridge drops it; make it an nnx.Variable")
        elif isinstance(leaf, nnx.RngState):
            problems.append(
                f"{name} is RNG state, which draws differently at each stage: "
                "pass dropout keys in the call instead (see model/nnx/mlp.py)"
            )
        elif isinstance(leaf, nnx.Param) and type(leaf) is not nnx.Param:
            problems.append(
                f"{name} is a {type(leaf).__name__}, a subclass of nnx.Param, which the bridge "
                "puts in a collection of its own, where the optimizer misses it: use nnx.Param"
            )
    if problems:
        raise ValueError("This nnx module cannot be staged:\n  " + "\n  ".join(problems))
    return graphdef, state


def _leaves(state: Any) -> Leaves:
    """`{"collection/half/path": value}` of an nnx state; a collection is a Variable's type."""
    leaves = {}
    for path, leaf in nnx.to_flat_state(state):
        # As the bridge does it: a type that nobody has registered is called by its own name.
        collection = nnx.variable_name_from_type(type(leaf), allow_register=True)
        leaves["/".join(map(str, (collection, *path)))] = leaf.get_value()
    return leaves
