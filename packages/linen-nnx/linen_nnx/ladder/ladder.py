"""The ladder: one model at four stages between Linen and nnx, behind Linen's `init` and `apply`.

    stage         root    parts not yet ported          parts ported
    linen         Linen   Linen                         Linen
    nnx_in_linen  Linen   Linen                         nnx, through bridge.to_linen
    linen_in_nnx  nnx     Linen, through bridge.ToNNX   nnx
    nnx           nnx     nnx                           nnx

A model is one part, or several named ones that one function puts together. A model of one part has
no part that is ported and another that is not, so it is bridged whole: it is nnx at `nnx_in_linen`
and Linen at `linen_in_nnx`.

This module knows what a ladder is made of and computes it when it is needed. `stage` checks and
runs a call, `forms` translates variables, `search` and `feed` deal with random draws.
"""

import inspect
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jax import Array

from linen_nnx.book.draws import Pairing
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.stages import STAGES, WHOLE, Forms, forms_at
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.infer.arguments import flat_outputs
from linen_nnx.infer.calls import complete, init
from linen_nnx.infer.keys import DrawError, aside, tag, watching
from linen_nnx.infer.twin import Twin, TwinError, attempt
from linen_nnx.ladder.call import Call
from linen_nnx.ladder.feed import feed
from linen_nnx.ladder.forms import FittedBook
from linen_nnx.ladder.modes import in_mode
from linen_nnx.ladder.move import move
from linen_nnx.ladder.port import Leaves, Port
from linen_nnx.ladder.program import Program, trace
from linen_nnx.ladder.roots import Bound, LinenPart, LinenRoot, NnxRoot
from linen_nnx.ladder.search import Findings, search
from linen_nnx.ladder.stage import Stage


@dataclass(frozen=True)
class Part:
    """One part of a model, in both frameworks.

    Attributes:
      linen: `() -> nn.Module`, or the module.
      nnx: `(rngs) -> nnx.Module`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn, nnx
      >>> from linen_nnx import Ladder, Part, RuleBook
      >>> parts = {
      ...     "body": Part(nn.Dense(3), lambda rngs: nnx.Linear(2, 3, rngs=rngs)),
      ...     "head": Part(nn.Dense(1), lambda rngs: nnx.Linear(3, 1, rngs=rngs)),
      ... }
      >>> rules = [{"linen": "params/{part}/{leaf}", "nnx": "{part}/{leaf}"}]
      >>> ladder = Ladder(parts=parts, forward=lambda parts, x: parts.head(parts.body(x)),
      ...                 inputs=lambda: (jnp.ones((1, 2)),),
      ...                 rules=RuleBook.from_dict({"version": 1, "rules": rules}))
      >>> dict(ladder.at("nnx_in_linen").forms)
      {'body': 'nnx', 'head': 'linen'}
    """

    linen: Callable[[], nn.Module] | nn.Module
    nnx: Callable[[nnx.Rngs], nnx.Module]

    def module(self) -> nn.Module:
        """The Linen module."""
        if isinstance(self.linen, nn.Module):
            return self.linen
        return attempt("linen()", self.linen)


@dataclass(frozen=True)
class WholeTwin(Twin):
    """The twin of a model of several parts, with the ladder that puts them together."""

    ladder: "Ladder | None" = None


class Ladder:
    """A model at each stage of its migration.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn, nnx
      >>> from linen_nnx import Ladder, Twin
      >>> twin = Twin(linen=lambda: nn.Dense(3),
      ...             nnx=lambda rngs: nnx.Linear(2, 3, rngs=rngs),
      ...             inputs=lambda: (jnp.ones((1, 2)),))
      >>> ladder = Ladder(twin)
      >>> x = jnp.ones((4, 2))
      >>> for name in ("linen", "nnx_in_linen", "linen_in_nnx", "nnx"):
      ...     model = ladder.at(name)
      ...     variables = model.init(jax.random.key(0), x)
      ...     print(model.apply(variables, x).shape, list(variables))
      (4, 3) ['params']
      (4, 3) ['params']
      (4, 3) ['params']
      (4, 3) ['params']
    """

    def __init__(
        self,
        twin: Twin | None = None,
        rules: RuleBook | str | Path | None = None,
        *,
        parts: Mapping[str, Part] | None = None,
        forward: Callable[..., Any] | None = None,
        inputs: Callable[[], tuple[Any, ...]] | None = None,
        methods: Mapping[str, Callable[..., Any]] | None = None,
        ported: Sequence[str] | None = None,
        # On stderr, as stdout may be the result of the program.
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        """A ladder over a twin, or over parts. Nothing is computed before it is needed.

        Args:
          twin: the model, if it is one part. Its `call_nnx` runs the calls whose arguments it
            takes. In any other call the nnx model gets the arguments of the Linen call, and its
            mode: training or evaluation.
          rules: a rule book or its file; None: what `suggest` finds for the models.
          parts: the parts by name, if there are several.
          forward: `(parts, *args, **kwargs) -> outputs`, the model put together; it runs under both
            roots, on submodules of either framework.
          inputs: `() -> tuple`, the arguments of an example call of `forward`.
          methods: more entries like `forward`, by name; `apply(..., method=name)` runs them.
          ported: the parts that are nnx modules at both hybrid stages; by default the first.
          say: is told, in one line each, what was chosen without being asked.

        Raises:
          TwinError: when a part of the models cannot be built.
          RuleError: when the rule book does not fit them (at the first use).
        """
        if (twin is None) == (parts is None):
            raise TwinError("Ladder takes a twin, or parts with `forward` and `inputs`")
        if parts is not None and (forward is None or inputs is None):
            raise TwinError("parts need `forward` and `inputs`: Ladder(parts=..., forward=...)")
        if twin is not None:
            # From here on a twin is a model of one part, whose name is empty.
            parts, inputs = {WHOLE: Part(twin.linen, twin.nnx)}, twin.inputs
        assert parts is not None and inputs is not None
        for name in ported or ():
            if name not in parts:
                raise TwinError(f"`ported` names {name!r}; the parts are {', '.join(parts)}")
        self.parts, self.forward, self.say = dict(parts), forward, say
        self._twin, self._inputs, self._methods = twin, inputs, dict(methods or {})
        self._ported = [next(iter(parts))] if ported is None else list(ported)
        self._given_rules = rules
        self._stages: dict[str, Stage] = {}
        self._programs: dict[Any, Program] = {}
        self.searched: set[str] = set()
        """The kinds of calls whose draws were not taken from the rule book, but found."""

    def at(self, stage: str) -> Stage:
        """The model at a stage: `linen`, `nnx_in_linen`, `linen_in_nnx` or `nnx`."""
        if stage not in STAGES:
            raise TwinError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
        # One object for each stage: `jax.jit(stage.apply)` finds its compiled program by it.
        if stage not in self._stages:
            self._stages[stage] = Stage(self, stage, self.forms(stage))
        return self._stages[stage]

    def forms(self, stage: str) -> Forms:
        """The form of each part at a stage."""
        return forms_at(stage, self.parts, self._ported)

    @cached_property
    def rules(self) -> RuleBook:
        """The rule book that was given, or what the models' code proves."""
        if isinstance(self._given_rules, RuleBook):
            return self._given_rules
        if self._given_rules is not None:
            return RuleBook.load(self._given_rules)
        # Not the `suggest` of this package, which needs a ladder to pair draws: here, draws are
        # paired when a call first needs them.
        from linen_nnx.infer.suggest import suggest

        return suggest(self.twin)

    def with_rules(self, rules: RuleBook, say: Callable[[str], None]) -> "Ladder":
        """The same model with another rule book; nothing that was computed is kept."""
        if self._twin is not None:
            return Ladder(self._twin, rules, say=say)
        return Ladder(
            rules=rules,
            parts=self.parts,
            forward=self.forward,
            inputs=self._inputs,
            methods=self._methods,
            ported=self._ported,
            say=say,
        )

    @cached_property
    def twin(self) -> Twin:
        """The whole model as a twin, whatever its parts."""
        if self._twin is not None:
            return self._twin

        # Under the names that the parts have in Linen, so that all paths begin with a part's name.
        def build(rngs: nnx.Rngs) -> nnx.Module:
            return NnxRoot({name: part.nnx(rngs) for name, part in self.parts.items()})

        forward = self.forward
        assert forward is not None
        return WholeTwin(
            linen=lambda: self.linen,
            nnx=build,
            ladder=self,
            inputs=self._inputs,
            call_linen=lambda module, variables, *inputs: module.apply(
                variables, *inputs, method=forward
            ),
            call_nnx=lambda model, *inputs: forward(model, *inputs),
            init_linen=lambda module, key, *inputs: module.init(key, *inputs, method=forward),
        )

    @cached_property
    def linen(self) -> nn.Module:
        """The whole model in Linen; the unmodified module, where it is one part."""
        if self.forward is None:
            return self.parts[WHOLE].module()
        return LinenRoot(lambda: {name: part.module() for name, part in self.parts.items()})

    @cached_property
    def ports(self) -> dict[str, Port]:
        """The structure of each part in nnx."""
        return {name: Port(part.nnx, name) for name, part in self.parts.items()}

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of the example call."""
        # What needs them first may be under `jax.jit`, where the arrays would be tracers.
        return aside(lambda: attempt("inputs() of the twin", self._inputs))

    @cached_property
    def book(self) -> FittedBook:
        """The rule book, fitted to both models."""
        return FittedBook(self.rules, self.linen_specs, self.ports)

    @cached_property
    def linen_specs(self) -> Leaves:
        """The shapes of the Linen model's leaves, for which no rules are needed."""
        return attempt("the Linen init of the twin", jax.eval_shape, self.first_leaves)

    def first_leaves(self) -> Leaves:
        """The leaves of the Linen model's init on the example; to be traced."""
        return flatten(nn.unbox(self.initial(jax.random.key(0))))

    def initial(self, rngs: Any) -> Any:
        """Initial variables of the Linen model for the example call."""
        twin = self.twin
        if twin.init_linen is None:
            try:
                return init(self.linen, rngs, *self.inputs)
            except (TypeError, ValueError):
                # It wants to be told whether it trains, as by a flag `train` without a default.
                twin = complete(twin)
        assert twin.init_linen is not None
        return twin.init_linen(self.linen, rngs, *self.inputs)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """`Module.init` of the Linen model."""
        # A root of several parts has no `__call__`: it runs whatever it is given as `method`.
        if self.forward is not None and kwargs.get("method") is None:
            kwargs["method"] = self.forward
        return init(self.linen, rngs, *args, **kwargs)

    def translate(self, leaves: Mapping[str, Any], source: str, target: str) -> Leaves:
        """`{"collection/path": leaf}` of one stage as another stage holds it."""
        return self.book.translate(leaves, self.forms(source), self.forms(target))

    def move(self, tree: Any, source: str, target: str) -> Any:
        """A whole training state at another stage: any pytree, such as a `TrainState`.

        Each subtree that mirrors the model is translated (parameters, statistics, moments,
        averages), as `convert` does on disk; containers keep their types; the rest stays as it is.

        Raises:
          RuleError: with everything that has no home, or may not go along as it is.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> from flax import linen as nn, nnx
          >>> from linen_nnx import Ladder, Twin
          >>> class Port(nnx.Module):
          ...     def __init__(self, *, rngs):
          ...         self.out = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
          ...     def __call__(self, x):
          ...         return self.out(x)
          >>> twin = Twin(linen=lambda: nn.Dense(3, use_bias=False),
          ...             nnx=lambda rngs: Port(rngs=rngs), inputs=lambda: (jnp.ones((1, 2)),))
          >>> state = optax.trace(0.9).init({"kernel": jnp.ones((2, 3))})
          >>> moved = Ladder(twin).move(state, "linen", "nnx")
          >>> type(moved).__name__, jax.tree.map(jnp.shape, moved.trace)
          ('TraceState', {'out': {'kernel': (2, 3)}})
        """
        before, after = self.at(source).forms, self.at(target).forms
        return tree if before == after else move(self.book, tree, before, after, target, self.say)

    def load(
        self,
        path: str | Path,
        stage: str,
        like: Any,
        *,
        rules: RuleBook | str | Path | None = None,
        fresh: Collection[str] = (),
    ) -> Any:
        """A checkpoint from anywhere as a training state at a stage.

        Any layout that `convert` reads, of Linen or nnx. It is read by the names of `like`; what
        the checkpoint has beside that is left out, and `say` names it.

        Args:
          path: the checkpoint.
          stage: where training goes on.
          like: a state of that stage, of arrays or shapes: a `TrainState`, or a dict.
          rules: a rule book from the checkpoint's names to those of this ladder, or its file: its
            own names on the side that it is of, the ladder's on the other. None: they are the same.
          fresh: entries that are not read, such as `opt_state`: there the result has what `like`
            has.

        Returns:
          A tree like `like`, of numpy arrays.

        Raises:
          StoreError: if there is no checkpoint, or it cannot be read.
          RuleError: naming everything that is missing, misshapen, or cannot be taken along.

        Example:
          >>> import jax.numpy as jnp, tempfile
          >>> from flax import linen as nn, nnx, serialization
          >>> from linen_nnx import Ladder, RuleBook, Twin
          >>> class Port(nnx.Module):
          ...     def __init__(self, *, rngs):
          ...         self.out = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
          ...     def __call__(self, x):
          ...         return self.out(x)
          >>> twin = Twin(linen=lambda: nn.Dense(3, use_bias=False),
          ...             nnx=lambda rngs: Port(rngs=rngs), inputs=lambda: (jnp.ones((1, 2)),))
          >>> ladder = Ladder(twin, RuleBook.from_dict({"version": 1, "rules": [
          ...     {"linen": "params/kernel", "nnx": "out/kernel"}]}))
          >>> file = Path(tempfile.mkdtemp(), "old.msgpack")
          >>> _ = file.write_bytes(serialization.to_bytes({"params": {"kernel": jnp.ones((2, 3))}}))
          >>> ladder.load(file, "nnx", ladder.at("nnx").abstract())["params"]["out"]["kernel"].shape
          (2, 3)
        """
        # Imported here, as most scripts read no checkpoint but their own.
        from linen_nnx.ladder.load import Checkpoint

        book = RuleBook.load(rules) if isinstance(rules, str | Path) else rules
        found = Checkpoint(self.book, path, book)
        return found.load(stage, self.at(stage).forms, like, fresh, self.say)

    def entry(self, method: Any) -> Callable[..., Any]:
        """The function `(module or parts, *args, **kwargs)` that a method stands for.

        Args:
          method: as `Module.apply` takes it: None, a name, or a function.

        Raises:
          TwinError: for a name that is none of the ladder's `methods`.
        """
        # As `Module.apply(method=Net.encode)` takes it, where `Net` is the Linen class.
        if callable(method):
            return method
        if self.forward is None:
            return getattr(type(self.linen), method or "__call__")
        if method is not None and method not in self._methods:
            known = ", ".join(self._methods) or "none"
            raise TwinError(f"there is no method {method!r}; `methods` of the ladder has: {known}")
        return self._methods[method] if method else self.forward

    def part(self, name: str) -> str:
        """The part of a leaf `collection/part/path`."""
        return WHOLE if WHOLE in self.parts else name.split("/")[1]

    def leaves_of(self, part: str, leaves: Leaves) -> Leaves:
        """The leaves `{"collection/path": leaf}` of one part, without its name."""
        if part == WHOLE:
            return leaves
        own: Leaves = {}
        for name, leaf in leaves.items():
            collection, of, path = name.split("/", 2)
            if of == part:
                own[f"{collection}/{path}"] = leaf
        return own

    def linen_type(self, part: str) -> type:
        """The class of a part's Linen module."""
        return type(self.parts[part].module())

    def run_linen(self, variables: Any, call: Call, **options: Any) -> Any:
        """Runs the call in Linen, as it would be without a ladder."""
        method = call.method if self.forward is None else self.entry(call.method)
        rngs = call.rngs or None
        return self.linen.apply(
            variables, *call.args, rngs=rngs, method=method, mutable=call.mutable,
            **options, **call.kwargs,
        )  # fmt: skip

    def run_bridged(
        self, bridged: Mapping[str, nn.Module], variables: Any, call: Call, mutable: Any
    ) -> Any:
        """Runs the call under a Linen root.

        Args:
          bridged: the parts in nnx form, as Linen modules.
          variables: of all parts, as the bridge wants them.
          call: the call; `mutable`: its filter, widened by the names that the bridge has.
        """
        if self.forward is None:

            def method(model: Any, *args: Any, **kwargs: Any) -> Any:
                return self._on_nnx(model, call, args, kwargs)

            # A whole model that is bridged has a keyword of its own for the method.
            options: dict[str, Any] = {"nnx_method": method}
            root = bridged[WHOLE]
        else:

            def make() -> dict[str, nn.Module]:
                modules: dict[str, nn.Module] = {}
                for name, part in self.parts.items():
                    if name not in bridged:
                        modules[name] = part.module()
                return {**modules, **bridged}

            options = {"method": self.entry(call.method)}
            root = LinenRoot(make)
        return root.apply(
            variables, *call.args, rngs=call.rngs or None, mutable=mutable, **options, **call.kwargs
        )

    def nnx_root(
        self, forms: Forms, leaves: Leaves, call: Call, keys: Any, mode: str = "plain"
    ) -> nnx.Module:
        """The nnx root, each part filled with its leaves.

        Args:
          forms: the form of each part.
          leaves: `{"collection/part/path": array}` of all parts.
          call: the call that the root is for.
          keys: `{part: {stream: keys}}` of the parts in nnx form; `mode`: see `Port.fill`.
        """
        parts: dict[str, nnx.Module] = {}
        for part, form in forms.items():
            own = self.leaves_of(part, leaves)
            if form == "linen":
                bound = Bound(self.linen, part or None, call.rngs, call.mutable)
                parts[part] = LinenPart(bound, self.linen_type(part), unflatten(own))
            elif own or not self.ports[part].leaves:
                # A part that has leaves and got none is one that the example never calls: it is
                # left out.
                inner = {name.split("/", 1)[1]: leaf for name, leaf in own.items()}
                parts[part] = self.ports[part].fill(inner, keys[part], mode)
        return parts[WHOLE] if WHOLE in parts else NnxRoot(parts)

    def run_nnx(self, root: Any, call: Call) -> Any:
        """Runs the call on an nnx root."""
        if self.forward is not None:
            return self.entry(call.method)(root, *call.args, **call.kwargs)
        if isinstance(root, LinenPart):
            return root(*call.args, method=call.method, **call.kwargs)
        return self._on_nnx(root, call, call.args, call.kwargs)

    def _on_nnx(self, model: Any, call: Call, args: Any, kwargs: Any) -> Any:
        """Runs the call on a whole nnx model: its method with the name of the Linen method."""
        own = self.twin.call_nnx
        # The twin says how its port is called for the arguments of its example. A call with others,
        # say `train=True`, may be one that it does not take.
        if own is not None and call.method is None and _takes(own, model, *args, **kwargs):
            return own(model, *args, **kwargs)
        method = model if call.method is None else getattr(model, call.name)
        return in_mode(model, method, self.entry(call.method), args, kwargs)

    def program(self, call: Call) -> Program:
        """The keys that the Linen model draws in a call.

        Raises:
          Whatever Linen raises for the call.
        """
        key = (call.signature(), tuple(sorted(call.rngs)))
        # Calls of one signature are traced alike, and tracing a large model takes seconds.
        if key not in self._programs:

            def traced(rngs: Any, given: Any) -> Any:
                variables, arrays = given
                # The tag stays in the jaxpr, where `trace` finds it; it computes nothing.
                with watching(lambda name, key: tag(key, name)):
                    return flat_outputs(self.run_linen(variables, call.joined(arrays, rngs)))

            given = self.at("linen").abstract(), call.arrays
            self._programs[key] = trace(traced, call.rngs, given)
        return self._programs[key]

    @cached_property
    def pairings(self) -> dict[str, Pairing]:
        """What is known of the draws of each kind of call, `{kind: pairing}`."""
        return {pairing.kind: pairing for pairing in self.rules.draws}

    def pair(self, *args: Any, rngs: Any = None, method: Any = None, **kwargs: Any) -> RuleBook:
        """The rule book, with the draws of this kind of call paired.

        `apply` does the same when a kind of call first needs it. There, a draw without a partner
        gets a stream of its own. Here, it is an error. Once the book is saved, no run searches.

        Args:
          args: positional arguments of a call, as for `Stage.apply`; `kwargs`: its named ones. Of
            arrays only shape and dtype count.
          rngs: the streams that the call is given, if the model looks whether it has them.
          method: as for `Stage.apply`.

        Raises:
          DrawError: with each draw of the nnx model that has no partner, and why.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import linen as nn, nnx
          >>> from linen_nnx import Ladder, RuleBook, Twin
          >>> twin = Twin(linen=lambda: nn.Dropout(0.5, deterministic=False),
          ...             nnx=lambda rngs: nnx.Dropout(0.5, deterministic=False, rngs=rngs),
          ...             inputs=lambda: (jnp.ones((4, 2)),))
          >>> ladder = Ladder(twin, RuleBook([]), say=lambda text: None)
          >>> ladder.pair(jnp.ones((4, 2))).draws[0].pairs[0].linen
          Draw(path='dropout', count=0, lane=())
        """
        call = Call(method, args, kwargs, dict(rngs or {}), self.at("linen").mutable or False)
        found = self.find_draws(call)
        if found.problem:
            kind = found.pairing.kind
            raise DrawError(f"In {kind}, draws of the nnx model have no partner: {found.own}")
        return RuleBook(self.rules.rules, self.rules.unassigned, self.pairings.values())

    def find_draws(self, call: Call) -> Findings:
        """Finds the draws of a kind of call, and says what it found in a line."""
        # The time is said, as a run that stands still wants a reason: each draw takes two runs or
        # more of a model that has been compiled once.
        start = time.monotonic()
        found = search(self, call)
        pairing = found.pairing
        self.pairings[pairing.kind] = pairing
        self.searched.add(pairing.kind)
        line = f"{pairing.kind}: {len(pairing.pairs)} draws of the nnx model get Linen's keys"
        if found.problem:
            line += f"; {len(pairing.own)} have streams of their own: {found.own}"
        self.say(f"{line} (paired in {time.monotonic() - start:.1f} s)")
        return found

    def keys(self, forms: Forms, call: Call) -> dict[str, dict[str, Array]]:
        """`{part: {stream: keys}}` of the streams of parts in nnx form of which something is known.

        Of a kind of call that was never paired, nothing is known.
        """
        # A port without streams draws nothing: then even the kind of the call need not be known.
        pairing = None
        if any(forms[part] == "nnx" and self.ports[part].streams for part in forms):
            pairing = self.pairings.get(call.kind(self.entry(call.method)).kind)
        if pairing is None:
            return {part: {} for part in forms}
        return feed(self, forms, call, pairing)


def _takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
