"""Takes the state of every optimizer of optax from Linen to nnx, and one step further there.

    python -m benchmarks.optimizers [NAME ...] [--write]

Each factory of `optax` and `optax.contrib` trains a TrainState for two steps. The converter takes
the checkpoint to nnx, Orbax restores it into an `nnx.Optimizer`, and both do a third step, whose
parameters are compared bit by bit. What is refused is refused by name, and its remedy is tried.
Prints the table of docs/optax.md; `--write` puts it there. Takes about three minutes.

Two rule books: one renames every leaf, and keeps their order; one stacks two layers. There a step
is the same in every bit for what computes element by element. What takes a leaf as a whole (the
norm of a kernel, say) is another optimizer for two layers in one leaf, whatever becomes of its
state: that is known by training both forms from the beginning.
"""

import argparse
import inspect
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import yaml
from flax import nnx
from flax.training.train_state import TrainState

from linen_nnx import RuleBook, RuleError
from linen_nnx.disk.convert import convert
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.proof.verify import verify

PAGE = Path(__file__).parents[1] / "docs" / "optax.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
SAME = "the same bits"
ROUNDED = "converted; it adds up, and rounds otherwise"
OTHER = "converted; it takes a leaf as a whole, and is another optimizer there"
_ROUNDING = 1e-5  # of parameters of the size of one, in a few steps
FORMS = {
    "renamed": [{"linen": "params/d_{i}/{leaf}", "nnx": "e_{i}/{leaf}"}],
    "stacked": [
        {
            "linen": "params/layers/{leaf}",
            "nnx": "layers/{i}/{leaf}",
            "ops": [{"op": "stack", "capture": "i", "axis": 0}],
        }
    ],
}
Tree = Any
_PLACES = re.compile(r"`[^`]*` (\([^)]*\)(, `[^`]*` \([^)]*\))* )?| \[[\d, ]*\]")  # of one model


def _kernels(params: Tree) -> Tree:
    """A mask: true for kernels, in either form."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)


def _labels(params: Tree) -> Tree:
    """What `partition` sorts parameters by."""
    label = {True: "kernels", False: "rest"}
    return jax.tree_util.tree_map_with_path(lambda path, _: label[_is_kernel(path)], params)


def _is_kernel(path: Any) -> bool:
    return "kernel" in jax.tree_util.keystr(path)


def _adam() -> Any:
    return optax.adam(0.1)


# What a factory is given for an argument that has no default, by the argument's name.
_GIVEN: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("inner", "base_optimizer", "optimizer", "tx"), _adam),
    **dict.fromkeys(("mask", "freeze_mask"), lambda: _kernels),
    **dict.fromkeys(("learning_rate", "max_norm", "max_delta", "threshold"), lambda: 0.1),
    **dict.fromkeys(("clipping", "eta", "l2_norm_clip", "noise_multiplier"), lambda: 0.1),
    **dict.fromkeys(("decay", "gamma", "step_size"), lambda: 0.5),
    **dict.fromkeys(("max_consecutive_errors", "max_backtracking_steps"), lambda: 3),
    **dict.fromkeys(("max_linesearch_steps",), lambda: 3),
    "seed": lambda: 0,
    "adv_optimizer": lambda: optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    "step_size_fn": lambda: optax.linear_schedule(1.0, 0.5, 4),
    "should_transform_fn": lambda: lambda step, **_: step % 2 == 0,
    "f": lambda: lambda updates, params: jax.tree.map(lambda x: x / 2, updates),
    "measure": lambda: lambda updates: {"norm": optax.tree.norm(updates)},
    "measure_name": lambda: "norm",
    "measures": lambda: {"norm": lambda updates, *_, **__: optax.tree.norm(updates)},
    "transforms": lambda: {"kernels": _adam(), "rest": optax.sgd(0.1, momentum=0.9)},
    "param_labels": lambda: _labels,
}
# Arguments that are needed or telling in spite of their defaults.
_MORE: dict[str, dict[str, Any]] = {
    "add_noise": {"key": 0},
    "adafactor": {"learning_rate": 0.1, "min_dim_size_to_factor": 4},  # else nothing is factored
    "differentially_private_aggregate": {"key": 0},
    "lars": {"learning_rate": 10.0},  # its steps are tiny, and so are differences of them
    "lbfgs": {"linesearch": optax.scale_by_zoom_linesearch(max_linesearch_steps=3)},  # for speed
    "noisy_sgd": {"key": 0},
    "scale_by_factored_rms": {"min_dim_size_to_factor": 4},
    "schedule_free_adamw": {"learning_rate": 0.1},
    "schedule_free_sgd": {"learning_rate": 0.1},
}
# What is called in a way of its own.
_BUILT: dict[str, Callable[[], Any]] = {
    "MultiSteps": lambda: optax.MultiSteps(_adam(), 2).gradient_transformation(),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(
        learning_rate=0.1
    ),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.1)), ("adam", _adam())),
}
# What trains no TrainState, whatever becomes of its state.
NOT_TRIED = {
    "galore": "keeps arrays without elements, which Orbax does not save",
    "scale_by_galore": "the same",
    "lookahead": "takes parameters of a form of its own, a `LookaheadParams`",
    "measure_with_ema": "gives a measure of updates in place of them",
    "monitor": "keeps numbers of Python at first, which no `nnx.Optimizer` takes for its state",
    "scale_by_muon": "takes matrices alone; `muon` gives it these",
}
_CURVED = ("hutchinson_estimator_diag_hessian", "sophia")  # take the loss, for its curvature
_EACH_EXAMPLE = ("differentially_private_aggregate", "dpsgd")  # take a gradient of each example


def factories() -> dict[str, Callable[[], Any]]:
    """How to build each transformation of the installed optax, by the factory's name."""
    found = dict(_BUILT)
    for module in (optax, optax.contrib):
        for name, factory in vars(module).items():
            if name.startswith("_") or name in found or not inspect.isfunction(factory):
                continue
            result = inspect.signature(factory).return_annotation
            said = inspect.isclass(result) and issubclass(result, optax.GradientTransformation)
            if said or (result is inspect.Signature.empty and _builds(name, factory)):
                found[name] = _build(name, factory)
    return dict(sorted(found.items()))


def _builds(name: str, factory: Callable[..., Any]) -> bool:
    """Whether a function that does not say what it returns is a factory."""
    if not set(_needed(factory)) <= _GIVEN.keys():
        return False
    try:
        return isinstance(_build(name, factory)(), optax.GradientTransformation)
    except Exception:  # of what is none, anything may come
        return False


def _needed(factory: Callable[..., Any]) -> list[str]:
    """The arguments of a factory that have no default."""
    parameters = inspect.signature(factory).parameters.values()
    anything = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in anything]


def _build(name: str, factory: Callable[..., Any]) -> Callable[[], Any]:
    def build() -> Any:
        given = {argument: _GIVEN[argument]() for argument in _needed(factory)}
        return factory(**given | _MORE.get(name, {}))

    return build


# The same two layers in both forms, with leaves in the same order.


def _linen(form: str, seed: float) -> Tree:
    """Numbers in Linen form: two layers of (8, 16), apart or in one stack.

    They fill whole registers: what is left over is computed otherwise, and a stack has less of it.
    """

    def layer(number: int) -> dict[str, jax.Array]:
        kernel = jnp.cos(jnp.arange(128.0) * (seed + 0.3) + number).reshape(8, 16)
        return {"bias": jnp.sin(jnp.arange(16.0) + seed + number) / 4, "kernel": kernel}

    if form == "renamed":
        return {f"d_{n}": layer(n) for n in range(2)}
    return {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), layer(0), layer(1))}


class _Net(nnx.Module):
    """The same layers in nnx."""

    def __init__(self, form: str) -> None:
        layers = [nnx.Linear(8, 16, rngs=nnx.Rngs(0)) for _ in range(2)]
        if form == "renamed":
            self.e_0, self.e_1 = layers
        else:
            self.layers = nnx.List(layers)

    def set(self, leaves: list[jax.Array]) -> "_Net":
        nnx.update(self, self.state_of(leaves))
        return self

    def state_of(self, leaves: list[jax.Array]) -> Any:
        """A state with these leaves, in order."""
        return jax.tree.unflatten(jax.tree.structure(nnx.state(self, nnx.Param)), leaves)

    def leaves(self) -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(self, nnx.Param))


def _in_nnx(form: str, tree: Tree) -> list[jax.Array]:
    """The leaves of a tree in Linen form as those of an nnx state."""
    if form == "renamed":
        return jax.tree.leaves(tree)
    layers = tree["layers"]
    return [layers[name][n] for n in range(2) for name in sorted(layers)]


@dataclass(frozen=True)
class Trial:
    """One transformation in one pair of forms."""

    name: str
    form: str
    tx: Any
    folder: Path

    @property
    def book(self) -> RuleBook:
        return RuleBook.from_dict({"version": 1, "rules": FORMS[self.form]})

    def outcome(self) -> str:
        """`SAME`, `OTHER`, or why the conversion is refused; raises `AssertionError` for faults."""
        state = self._fresh()
        for number in range(2):
            state = self._stepped(state, number)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / "linen", state)
        try:
            convert(self.folder / "linen", self.folder / "nnx", "nnx", rules=self.book)
        except RuleError as error:
            return self._refused(error)
        for check in verify(self.folder / "linen", self.folder / "nnx"):
            assert check.passed is not False, check
        expected = _in_nnx(self.form, self._stepped(state, 2).params)
        model, optimizer = self._restored()
        self._step(model, optimizer, 2)
        apart = _apart(model.leaves(), expected)
        model, optimizer = self._nnx()
        for number in range(3):
            self._step(model, optimizer, number)
        if self.form == "stacked" and _apart(model.leaves(), expected) > _ROUNDING:
            return OTHER
        exact = self.form == "renamed" or self._is_elementwise(state)
        assert apart <= (0 if exact else _ROUNDING), f"the step afterwards differs by {apart}"
        return SAME if exact else ROUNDED

    def _is_elementwise(self, state: TrainState) -> bool:
        """Whether one element of a gradient changes one element of the parameters, and no other."""
        steps = [self._stepped(state, 2, more).params["layers"]["kernel"] for more in (0.0, 1.0)]
        changed = np.asarray(steps[0]) != np.asarray(steps[1])
        changed[0, 0, 0] = False
        return not changed.any()

    def _fresh(self) -> TrainState:
        params = _linen(self.form, 1.0)
        return TrainState.create(apply_fn=lambda: None, params=params, tx=self.tx)

    def _stepped(self, state: TrainState, number: int, more: float = 0.0) -> TrainState:
        """The state after one step; `more` is added to the first element of a stack's gradient."""
        grads = _linen(self.form, 2.0 + number)
        if more:
            grads["layers"]["kernel"] = grads["layers"]["kernel"].at[0, 0, 0].add(more)
        given, besides = self._of_each_example(grads), self._besides(grads, state.params)
        updates, kept = self.tx.update(given, state.opt_state, state.params, **besides)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=kept)

    def _nnx(self) -> tuple[_Net, Any]:
        """Model and optimizer in nnx, before any step."""
        model = _Net(self.form).set(_in_nnx(self.form, _linen(self.form, 1.0)))
        return model, nnx.Optimizer(model, self.tx, wrt=nnx.Param)

    def _restored(self) -> tuple[_Net, Any]:
        """Model and optimizer as Orbax restores them from the result."""
        model, optimizer = self._nnx()
        both = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(self.folder / "nnx", both)
        nnx.update(model, found["model"])
        nnx.update(optimizer, found["optimizer"])
        return model, optimizer

    def _step(self, model: _Net, optimizer: Any, number: int) -> None:
        """The same step in nnx."""
        grads = model.state_of(_in_nnx(self.form, _linen(self.form, 2.0 + number)))
        besides = self._besides(nnx.pure(grads), nnx.pure(nnx.state(model, nnx.Param)))
        optimizer.update(model, self._of_each_example(grads), **besides)

    def _of_each_example(self, grads: Tree) -> Tree:
        if self.name not in _EACH_EXAMPLE:
            return grads
        return jax.tree.map(lambda grad: jnp.stack([grad, grad / 2]), grads)

    def _besides(self, grads: Tree, params: Tree) -> dict[str, Any]:
        """What some transformations ask for beside gradients, by the name that they have for it."""

        def loss(at: Tree, power: int = 1) -> jax.Array:
            products = jax.tree.map(lambda grad, x: jnp.vdot(grad, x**power), grads, at)
            return sum(jax.tree.leaves(products), jnp.zeros(()))

        if self.name == "sam":  # takes nothing beside gradients
            return {}
        if self.name in _CURVED:
            return {"obj_fn": lambda at: loss(at, 3)}
        return {"value": loss(params), "grad": grads, "value_fn": loss}

    def _refused(self, error: RuleError) -> str:
        """Why, without the leaf's name; raises `AssertionError` where no remedy works."""
        (kind, *_) = error.problems
        source = self.folder / "linen"
        for text in set(re.findall(r"\{linen: \S+, nnx: \S+\}", str(error))):
            rules = [*FORMS[self.form], yaml.safe_load(text)]
            left = _problems(source, RuleBook.from_dict({"version": 1, "rules": rules}))
            assert not any(text in problem for problem in left), f"{text} is no remedy"
        assert "--reset-optimizer" in kind, kind
        plan_conversion(source, "nnx", self.book, reset_optimizer=True)
        return f"refused: {_PLACES.sub('', kind).partition(': ')[0]}"


def _problems(source: Path, rules: RuleBook) -> tuple[str, ...]:
    """What a plan is refused for."""
    try:
        plan_conversion(source, "nnx", rules)
    except RuleError as error:
        return tuple(error.problems)
    return ()


def _apart(some: list[jax.Array], others: list[jax.Array]) -> float:
    """The largest difference of parameters, which are of the size of one; 0: the same bits."""
    pairs = list(zip(some, others, strict=True))
    if all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs):
        return 0.0
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def outcomes(name: str) -> tuple[str, ...]:
    """What comes of a transformation in each of `FORMS`."""
    build = factories()[name]
    found = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optax and Orbax, about how they are used here
            tx = optax.with_extra_args_support(build())
            # One operation after the other: what is compiled for other shapes rounds otherwise.
            with jax.disable_jit():
                found.append(Trial(name, form, tx, Path(folder)).outcome())
    return tuple(found)


def table(found: dict[str, tuple[str, ...]]) -> str:
    """The outcomes as Markdown: a row for all transformations of which the same comes."""
    rows = {}
    for name, both in found.items():
        rows.setdefault(both, []).append(f"`{name}`")
    lines = ["| transformations | renamed | two layers in a stack |", "|---|---|---|"]
    for both in sorted(rows, key=lambda both: (-len(rows[both]), both)):
        lines.append(f"| {', '.join(rows[both])} | {' | '.join(both)} |")
    return "\n".join(lines) + "\n"


def tried(names: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each transformation with what came of it."""
    for name in names:
        print(name, end=" ", flush=True, file=sys.stderr)
        yield name, outcomes(name)


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; default: all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/optax.md")
    options = parser.parse_args()
    every = [name for name in factories() if name not in NOT_TRIED]
    found = table(dict(tried(options.names or every)))
    print(found)
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + found + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
