"""One stage of a migration, with the `init` and `apply` of the Linen module that one has.

    model = ladder.at("nnx_in_linen")
    variables = model.init({"params": key}, x, train=False)
    y, updates = model.apply(
        variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )

`variables` are plain nested dicts with string keys at every stage (indices of lists are digits), so
that a training step keeps, shards and saves them as ever. Flax's bridge accepts variables of a
wrong shape without a word. Here they are compared with what the stage expects, while the call is
traced, and so at no cost per step.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from linen_nnx.book.stages import STAGES, WHOLE, Forms
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.errors import Refusal
from linen_nnx.infer.keys import Undrawn, is_mutable
from linen_nnx.ladder.call import Call
from linen_nnx.ladder.forms import check, collections_of
from linen_nnx.ladder.port import Leaves, values
from linen_nnx.ladder.roots import Bridged
from linen_nnx.ladder.view import View

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder

Variables = dict[str, Any]


class _Outcome(NamedTuple):
    """What a call has done.

    outputs: those of the model. after: the leaves afterwards, by name. unchanged: for each leaf of
    a part in nnx form, whether its Variable still holds the array that it was given.
    """

    outputs: Any
    after: Leaves
    unchanged: Mapping[str, bool]


class Stage:
    """A model at one stage; made by `Ladder.at`.

    Attributes:
      name: a key of `STAGES`.
      forms: `{part: "linen" or "nnx"}`; a model of one part has the part "".
      mutable: the collections beside the parameters, sorted.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn, nnx
      >>> from linen_nnx import Ladder, Twin
      >>> twin = Twin(linen=lambda: nn.BatchNorm(),
      ...             nnx=lambda rngs: nnx.BatchNorm(2, rngs=rngs),
      ...             inputs=lambda: (jnp.ones((4, 2)), True))
      >>> stage = Ladder(twin).at("nnx")
      >>> stage.mutable
      ['batch_stats']
      >>> variables = stage.init(jax.random.key(0), jnp.ones((4, 2)), True)
      >>> y, updates = stage.apply(variables, jnp.ones((4, 2)), False, mutable=["batch_stats"])
      >>> y.shape, sorted(updates["batch_stats"])
      ((4, 2), ['mean', 'var'])
    """

    def __init__(self, ladder: "Ladder", name: str, forms: Forms) -> None:
        self.ladder, self.name, self.forms = ladder, name, forms
        self._root = STAGES[name]

    @property
    def mutable(self) -> list[str]:
        """The collections that a call may update beside the parameters, sorted."""
        return collections_of(self._specs)

    def abstract(self) -> Variables:
        """The variables as `jax.ShapeDtypeStruct`s; nothing is computed.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import linen as nn, nnx
          >>> from linen_nnx import Ladder, Twin
          >>> twin = Twin(linen=lambda: nn.Dense(3, use_bias=False),
          ...             nnx=lambda rngs: nnx.Linear(2, 3, use_bias=False, rngs=rngs),
          ...             inputs=lambda: (jnp.ones((1, 2)),))
          >>> Ladder(twin).at("nnx").abstract()
          {'params': {'kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}}
        """
        return unflatten(self._specs)

    @cached_property
    def view(self) -> View:
        """The parameters seen as those of the all-nnx model, for norms and masks without names."""
        return View(self)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Variables:
        """Initial variables in this stage's form.

        The Linen model draws them at every stage, so that all stages start from the same bits. The
        arguments are those of `Module.init`.
        """
        # Translated and not drawn again: the constructors of nnx draw other numbers from a key.
        return self._whole(self.ladder.init(rngs, *args, **kwargs))

    def initial(self, rngs: Any) -> Variables:
        """Initial variables for the example call of the twin.

        The example call has no flags. A model that must be told whether it trains is initialised in
        evaluation.

        Args:
          rngs: as for `Module.init`.

        Raises:
          Whatever the Linen model raises, as for a key that is missing.
        """
        return self._whole(self.ladder.initial(rngs))

    def _whole(self, variables: Mapping[str, Any]) -> Variables:
        """All variables of the Linen model in this stage's form, and those of nnx alone."""
        translated = flatten(self.translate(variables))
        return unflatten({**self.ladder.book.filled(self.forms), **translated})

    def translate(self, variables: Mapping[str, Any]) -> Variables:
        """Variables of the Linen model in this stage's form.

        Args:
          variables: nested dicts as `Module.init` returns them: some collections, or all.

        Raises:
          RuleError: for leaves that the rule book does not know.
        """
        leaves = flatten(unfreeze(nn.unbox(variables)))
        return unflatten(self.ladder.translate(leaves, "linen", self.name))

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the model, as `Module.apply` does; call it under `jax.jit`.

        Args:
          variables: as `init` returns them.
          args: positional arguments of the method; `kwargs`: its named ones.
          rngs: `{stream: key}`, or one key for `params`.
          method: None, a name, or a method of the Linen module.
          mutable: a collection, several, or True for all: their new values are returned as well.
          capture_intermediates: as for `Module.apply`, at stage `linen` alone.

        Returns:
          The outputs, or `(outputs, updates)` if `mutable`.

        Raises:
          VariablesError: when variables and stage differ, naming each difference.
          DrawError: when keys are missing.
          Refusal: for `capture_intermediates` at another stage than `linen`.
          Whatever the Linen model raises for the same call, at every stage: for a key that is
          missing, or a change of a collection that is not mutable.
        """
        # As in `Module.apply`, a key without a name is for `params`, to which streams fall back.
        named = rngs if rngs is None or isinstance(rngs, Mapping) else {"params": rngs}
        call = Call(method, args, kwargs, dict(named or {}), mutable)
        # FrozenDicts and boxes of sharding metadata are taken, as Linen takes them.
        variables = unfreeze(nn.unbox(variables))
        leaves = flatten(variables)
        # At stage `linen`, too: Linen takes a leaf that no module asks for without a word.
        check(leaves, self._specs, f"stage {self.name!r}")
        if self.name == "linen":
            return self.ladder.run_linen(
                variables, call, capture_intermediates=capture_intermediates
            )
        if capture_intermediates:
            raise Refusal(
                f"capture_intermediates works at stage 'linen' alone, this is {self.name!r}: the "
                "intermediate values of Linen modules and of nnx modules are not the same ones."
            )
        run = self._in_linen if self._root == "linen" else self._in_nnx
        keys = self.ladder.keys(self.forms, call)
        try:
            outcome = run(leaves, call, keys)
        except Undrawn:
            # A stream was drawn from of which nothing is known: the first call of its kind. Linen
            # is traced first, for its own error where the call lacks a key.
            self.ladder.program(call)
            self.ladder.find_draws(call)
            outcome = run(leaves, call, self.ladder.keys(self.forms, call))
        if not all(outcome.unchanged.values()):
            self._check_updates(call, outcome.unchanged)
        if mutable is False:
            return outcome.outputs
        updates: Leaves = {}
        for name, leaf in outcome.after.items():
            if is_mutable(name.split("/")[0], mutable):
                updates[name] = leaf
        return outcome.outputs, unflatten(updates)

    @property
    def _specs(self) -> Leaves:
        return self.ladder.book.abstract(self.forms)

    def _check_updates(self, call: Call, unchanged: Mapping[str, bool]) -> None:
        """Raises Linen's own error where a call would change a collection that is not mutable.

        Linen refuses such a change; nnx and the bridge lose it without a word.

        unchanged: whether the Variable of each leaf still holds the array that it was given.
        """
        changed = {name.split("/")[0] for name, same in unchanged.items() if not same}
        if any(not is_mutable(collection, call.mutable) for collection in changed):
            # Another array need not be another value: `nnx.remat` and `nnx.jit` replace all of
            # them. Linen's own trace tells, and raises where Linen would.
            self.ladder.program(call)

    def _in_nnx(self, leaves: Leaves, call: Call, keys: Any) -> _Outcome:
        """Runs the call under an nnx root."""
        ladder = self.ladder
        root = ladder.nnx_root(self.forms, leaves, call, keys)
        outputs = ladder.run_nnx(root, call)
        found, types = values(root)
        # All leaves, as an nnx module does not tell which of its Variables a call has touched.
        after: Leaves = {}
        for path, leaf in found.items():
            after[ladder.book.name(types[path], path)] = leaf
        unchanged: dict[str, bool] = {}
        for name in self._ported(leaves):
            unchanged[name] = after.get(name) is leaves[name]
        return _Outcome(outputs, after, unchanged)

    def _in_linen(self, leaves: Leaves, call: Call, keys: Any) -> _Outcome:
        """Runs the call under a Linen root, the ported parts through the bridge."""
        ladder = self.ladder
        bridged: dict[str, Bridged] = {}
        for part, form in self.forms.items():
            if form == "nnx":
                # It keeps the module of its latest call, whose Variables tell what has changed.
                bridged[part] = Bridged(ladder.ports[part], keys[part])
        variables, types = self._for_bridge(leaves)
        result = ladder.run_bridged(
            {part: one.to_linen() for part, one in bridged.items()},
            variables,
            call,
            _widened(call.mutable, types),
        )
        outputs, updates = (result, {}) if call.mutable is False else result
        return _Outcome(outputs, self._from_bridge(updates), self._unchanged(bridged, leaves))

    def _for_bridge(self, leaves: Leaves) -> tuple[Variables, dict[str, set[str]]]:
        """The variables as the bridge wants them: ported leaves below the type of their Variable.

        Returns:
          The variables, and `{collection: types of the ported Variables in it}`.
        """
        book = self.ladder.book
        ported = set(self._ported(leaves))
        tree: dict[tuple[Any, ...], Any] = {}
        types: dict[str, set[str]] = {}
        for name, leaf in leaves.items():
            collection, *path = name.split("/")
            if name in ported:
                # The keys are nnx's own, as the bridge looks up `layers`, 0 and not `layers`, "0".
                tree[book.types[name], *book.keys(name)] = leaf
                types.setdefault(collection, set()).add(book.types[name])
            else:
                tree[collection, *path] = leaf
        return unflatten_dict(tree), types

    def _from_bridge(self, updates: Mapping[str, Any]) -> Leaves:
        """What a call has updated, by the names that leaves have at this stage."""
        after: Leaves = {}
        # Updates of a Linen part have its names already; those of a bridged one have nnx's.
        for keys, leaf in flatten_dict(updates).items():
            kind, *path = map(str, keys)
            part = WHOLE if WHOLE in self.forms else path[0]
            inner = "/".join(path)
            if self.forms[part] == "nnx":
                after[self.ladder.book.name(kind, inner)] = leaf
            else:
                after[f"{kind}/{inner}"] = leaf
        return after

    def _unchanged(self, bridged: Mapping[str, Bridged], leaves: Leaves) -> dict[str, bool]:
        """Whether each Variable of the bridged parts holds the array that it was given."""
        result: dict[str, bool] = {}
        for part, one in bridged.items():
            if one.model is None:
                continue  # a part that this call does not use
            found, types = values(one.model)
            for path, leaf in found.items():
                whole = f"{part}/{path}" if part else path
                name = self.ladder.book.name(types[path], whole)
                result[name] = name in leaves and leaves[name] is leaf
        return result

    def _ported(self, leaves: Leaves) -> list[str]:
        """The names of the leaves of parts in nnx form."""
        return [name for name in leaves if self.forms[self.ladder.part(name)] == "nnx"]


def _widened(mutable: Any, types: Mapping[str, set[str]]) -> Any:
    """Linen's filter, widened by the names that the bridge has for the collections in it.

    A Variable of the type `Statistic` is in the collection `Statistic` for the bridge, and in
    `batch_stats` for the caller.
    """
    if isinstance(mutable, str):
        mutable = [mutable]
    if not isinstance(mutable, Collection):
        return mutable  # True, False or a DenyList: Linen's own meaning will do
    # The names themselves stay: Linen's own parts know no others.
    wide = list(mutable)
    for name in mutable:
        wide += types.get(name, ())
    return wide
