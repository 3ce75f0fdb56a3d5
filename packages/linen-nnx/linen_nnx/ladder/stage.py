"""One stage of a migration, with the `init` and `apply` of the Linen module that one has.

    model = ladder.at("nnx_in_linen")
    variables = model.init({"params": key}, x, train=False)
    y, updates = model.apply(
        variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )

`variables` are plain nested dicts with string keys at every stage (indices of lists are digits), so
that a training step keeps, shards and saves them as ever. What the bridge accepts in silence is
refused: variables are compared with the stage's abstract tree while tracing, at no cost per step.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import flax.linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from linen_nnx.book.stages import STAGES, WHOLE, Forms
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.errors import Refusal
from linen_nnx.infer.keys import Undrawn, is_mutable
from linen_nnx.ladder.calls import Call
from linen_nnx.ladder.forms import Leaves, check, collections_of
from linen_nnx.ladder.port import values
from linen_nnx.ladder.roots import Bridged
from linen_nnx.ladder.view import View

if TYPE_CHECKING:
    from linen_nnx.ladder.ladder import Ladder

Variables = dict[str, Any]


class Stage:
    """A model at one stage; made by `Ladder.at`.

    Attributes:
      name: a key of `STAGES`.
      forms: `{part: "linen" or "nnx"}`; a model of one part has the part "".
      mutable: the collections beside the parameters, sorted.
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
        """The parameters as those of the all-nnx model: norms and masks that know no names."""
        return View(self)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Variables:
        """Initial variables, as `Module.init` of the Linen model draws them, in this stage's form.

        So all stages start from the same bits. Arguments as those of `Module.init`.
        """
        return self.translate(self.ladder.init(rngs, *args, **kwargs))

    def initial(self, rngs: Any) -> Variables:
        """The same for the example call: in evaluation, where the model must be told.

        Args:
          rngs: as those of `Module.init`.

        Raises:
          Whatever the Linen model raises, for a key that is missing, say.
        """
        return self.translate(self.ladder.initial(rngs))

    def translate(self, variables: Mapping[str, Any]) -> Variables:
        """Variables of the Linen model in this stage's form; some collections, or all.

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
          args, kwargs: arguments of the method.
          rngs: `{stream: key}`, or one key for `params`.
          method: None, a name, or a method of the Linen module.
          mutable: a collection, collections, or True: then the second result are their values.

        Returns:
          The outputs, or `(outputs, updates)` if `mutable`.

        Raises:
          VariablesError: when variables and stage differ, naming each difference.
          DrawError: when keys are missing.
          Whatever the Linen model raises for the same call (missing keys, collections that are not
          mutable), at every stage.
        """
        named = rngs if rngs is None or isinstance(rngs, Mapping) else {"params": rngs}
        call = Call(method, args, kwargs, dict(named or {}), mutable)
        variables = unfreeze(nn.unbox(variables))
        leaves = flatten(variables)
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
            outputs, after, same = run(leaves, call, keys)
        except Undrawn:
            self.ladder.program(call)  # Linen's own error, where the call lacks a key
            self.ladder.find_draws(call)
            outputs, after, same = run(leaves, call, self.ladder.keys(self.forms, call))
        if not all(same.values()):
            self._check_updates(call, same)
        if mutable is False:
            return outputs
        kept = {n: leaf for n, leaf in after.items() if is_mutable(n.split("/")[0], mutable)}
        return outputs, unflatten(kept)

    @property
    def _specs(self) -> Leaves:
        return self.ladder.book.abstract(self.forms)

    def _check_updates(self, call: Call, same: Mapping[str, bool]) -> None:
        """Linen's own error where a call would change what is not mutable.

        Linen refuses it, nnx and the bridge lose the change. A Variable with another array in it
        may have been changed; whether it was, Linen's trace says.
        """
        changed = {name.split("/")[0] for name, unchanged in same.items() if not unchanged}
        if any(not is_mutable(name, call.mutable) for name in changed):
            self.ladder.program(call)

    def _in_nnx(self, leaves: Leaves, call: Call, keys: Any) -> tuple[Any, Leaves, dict[str, bool]]:
        """An nnx root: outputs, all leaves afterwards, and which are the arrays that were given."""
        ladder = self.ladder
        root = ladder.nnx_root(self.forms, leaves, call, keys)
        outputs = ladder.run_nnx(root, call)
        found, types = values(root)
        after = {}
        for path, leaf in found.items():
            after[ladder.book.name(types[path], path)] = leaf
        return outputs, after, {n: after.get(n) is leaf for n, leaf in self._ported(leaves)}

    def _in_linen(
        self, leaves: Leaves, call: Call, keys: Any
    ) -> tuple[Any, Leaves, dict[str, bool]]:
        """The same under a Linen root."""
        ladder, book = self.ladder, self.ladder.book
        bridged: dict[str, Bridged] = {}
        for part, form in self.forms.items():
            if form == "nnx":
                bridged[part] = Bridged(ladder.ports[part], keys[part])
        tree: dict[tuple[Any, ...], Any] = {}
        kinds: dict[str, set[str]] = {}
        for name, leaf in leaves.items():
            collection, *path = name.split("/")
            tree[collection, *path] = leaf
        for name, leaf in self._ported(leaves):
            collection, *path = name.split("/")
            del tree[collection, *path]
            tree[book.types[name], *book.keys(name)] = leaf
            kinds.setdefault(collection, set()).add(book.types[name])
        mutable = _widened(call.mutable, kinds)
        result = ladder.run_bridged(
            {part: one.to_linen() for part, one in bridged.items()},
            unflatten_dict(tree),
            call,
            mutable,
        )
        outputs, updates = (result, {}) if call.mutable is False else result
        after: Leaves = {}
        for path, leaf in flatten_dict(updates).items():
            kind, *rest = map(str, path)
            part = WHOLE if WHOLE in self.forms else rest[0]
            inner = "/".join(rest)
            ported = self.forms[part] == "nnx"
            after[book.name(kind, inner) if ported else f"{kind}/{inner}"] = leaf
        return outputs, after, self._kept(bridged, leaves)

    def _kept(self, bridged: Mapping[str, Bridged], leaves: Leaves) -> dict[str, bool]:
        same = {}
        for part, one in bridged.items():
            if one.model is None:
                continue
            found, types = values(one.model)
            for path, leaf in found.items():
                whole = f"{part}/{path}" if part else path
                name = self.ladder.book.name(types[path], whole)
                same[name] = name in leaves and leaves[name] is leaf
        return same

    def _ported(self, leaves: Leaves) -> list[tuple[str, Any]]:
        """The leaves of the parts in nnx form."""
        ladder = self.ladder
        return [(n, leaf) for n, leaf in leaves.items() if self.forms[ladder.part(n)] == "nnx"]


def _widened(mutable: Any, kinds: Mapping[str, set[str]]) -> Any:
    """Linen's filter with the collections that the bridge calls by the types of Variables."""
    if isinstance(mutable, str):
        mutable = [mutable]
    if isinstance(mutable, Collection):
        return [*mutable, *(kind for name in mutable for kind in kinds.get(name, ()))]
    return mutable
