"""What a rule for a parameter means for an array that an optimizer keeps of that parameter.

Two layers of kernels (8, 4), which a rule stacks to one (2, 8, 4) by `stack` along axis 0, and what
becomes of what optax keeps of each of them:

- Adam's moment, (8, 4): as the parameter, to (2, 8, 4);
- L-BFGS's memory of 10 steps, (10, 8, 4): the same behind its own axis, to (10, 2, 8, 4);
- Adafactor's `v_row`, which is the moment's mean along its longest axis, (4,): to (2, 4), along the
  axis that is left of the stack's; its `v`, which such a parameter does not need, is a placeholder
  (1,) there, and stays one.

SM3's maximum of each axis and NovoGrad's norm of each array have no such form: these are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from linen_nnx.book.ops import (
    Action,
    Agree,
    Copies,
    Fill,
    Gather,
    Permute,
    Reform,
    Spec,
    Spread,
)

Shape = tuple[int, ...]
PLACEHOLDER: Shape = (1,)
"""The shape of what optax's factored moments do not need of a parameter."""

FACTORED = ("v_row", "v_col", "v")
"""What optax calls the moments of Adafactor; the first two lack an axis of the parameter."""

ZEROS = frozenset(
    (
        *("mu", "nu", "nu_max", "m", "v", "n", "g", "m1", "m2", "s", "v_row", "v_col"),
        *("trace", "ema", "e_g", "e_x", "acc_grads", "grad_acc", "grad", "found_nan"),
        *("previous_gradient", "prev_updates", "updates", "params"),
        *("diff_params_memory", "diff_updates_memory"),
        *("exp_avg", "exp_avg_sq", "grad_sum", "grad_sum_sq"),
        *("cumulative_gradients", "subgradients", "reward"),
    )
)
"""What optax starts at 0 for every parameter, by the name of its field.

Yogi alone starts its `mu` and `nu` at 1e-6; nothing in a checkpoint tells them from Adam's.
"""

COPIES = frozenset({"init_params", "init_particles", "x0", "params0", "z"})
"""What optax starts at the parameter's own value."""

_DEFAULT_LIMIT = 128  # optax's `min_dim_size_to_factor`, unless one says otherwise


class Unknown(ValueError):
    """A form that cannot be told; the text says why."""


def shifted(actions: Sequence[Action], lead: Shape) -> tuple[Action, ...]:
    """The same actions on arrays that have the axes `lead` in front."""
    count = len(lead)
    result: list[Action] = []
    for action in actions:
        if isinstance(action, Gather):
            result.append(Gather(action.kind, action.axis + count, action.count, action.inner))
        elif isinstance(action, Spread):
            result.append(Spread(action.kind, action.axis + count, action.sizes))
        elif isinstance(action, Permute):
            result.append(Permute(_behind(count, action.perm)))
        elif isinstance(action, Copies | Agree):
            perms = tuple(perm if perm is None else _behind(count, perm) for perm in action.perms)
            result.append(replace(action, perms=perms))
        elif isinstance(action, Reform):
            result.append(Reform(tuple((*lead, *shape) for shape in action.shapes)))
        else:
            result.append(action)
    return tuple(result)


def _behind(count: int, perm: tuple[int, ...]) -> tuple[int, ...]:
    """A permutation of axes that leaves some in front where they are."""
    return (*range(count), *(axis + count for axis in perm))


def common_lead(pairs: Sequence[tuple[Shape, Shape]]) -> Shape | None:
    """The axes that every array has in front of its parameter's; None if there are no such.

    `pairs`: (shape of the array, shape of its parameter). Parameters that are all scalars tell
    nothing.

    Example:
      >>> common_lead([((10, 8, 4), (8, 4)), ((10, 4), (4,))])
      (10,)
      >>> common_lead([((8, 4), (8, 4)), ((4,), (4,))])
    """
    leads = {shape[: len(shape) - len(own)] for shape, own in pairs}
    ends = all(shape[len(shape) - len(own) :] == own for shape, own in pairs)
    if not ends or len(leads) != 1 or not any(own for _, own in pairs):
        return None
    return leads.pop() or None


@dataclass(frozen=True)
class Factoring:
    """How one optimizer factors: which parameters, and from which length on.

    Optax factors a parameter of two or more axes if the second longest is at least
    `min_dim_size_to_factor`. A checkpoint does not hold that number, but bounds for it.
    """

    at_least: int
    """The second longest axis of a parameter that is not factored: the number is larger."""
    at_most: int | None
    """The same of one that is: the number is not larger. None if there is none."""

    @classmethod
    def of(cls, params: Sequence[Shape], kept: Sequence[Shape]) -> "Factoring":
        """From the shapes of some parameters, and of what `v` keeps of them."""
        whole, split = [0], []
        for own, shape in zip(params, kept, strict=True):
            if len(own) > 1:
                (whole if shape == own else split).append(_second(own))
        return cls(max(whole), min(split, default=None))

    def factors(self, shape: Shape, notes: list[str], name: str) -> bool:
        """Whether a parameter of this shape is factored; what is assumed goes to `notes`."""
        if len(shape) < 2 or _second(shape) <= self.at_least:
            return False
        if self.at_most is not None:
            if _second(shape) >= self.at_most:
                return True
        elif _second(shape) >= _DEFAULT_LIMIT:
            return True
        notes.append(
            f"the moments of `{name}` {list(shape)} are taken for not factored: that needs a "
            f"min_dim_size_to_factor above {_second(shape)}"
        )
        return False


def _second(shape: Shape) -> int:
    return sorted(shape)[-2]


def factored_axes(shape: Shape) -> tuple[int, int]:
    """The axes that `v_row` and `v_col` lack: the longest and the second longest.

    Example:
      >>> factored_axes((2, 8, 4))
      (1, 2)
    """
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return order[-1], order[-2]


def factored_shape(field: str, shape: Shape, factored: bool) -> Shape:
    """What optax keeps in a field of `FACTORED` for a parameter.

    Example:
      >>> [factored_shape(field, (8, 4), True) for field in FACTORED]
      [(4,), (8,), (1,)]
    """
    if field == "v":
        return PLACEHOLDER if factored else shape
    if not factored:
        return PLACEHOLDER
    axis = factored_axes(shape)[FACTORED.index(field)]
    return shape[:axis] + shape[axis + 1 :]


def factored_actions(
    field: str,
    actions: Sequence[Action],
    before: Shape,
    after: Shape,
    factored: tuple[bool, bool],
) -> tuple[Action, ...]:
    """What a rule that stacks or unstacks does to a field of `FACTORED`.

    Args:
      field: its name; `actions`: what the rule does to the parameter.
      before, after: the shape of the parameter.
      factored: whether optax factors the parameter before, and after.

    Raises:
      Unknown: if no array of the one form holds what the other needs.
    """
    action = actions[0] if len(actions) == 1 else None
    if not isinstance(action, Gather | Spread) or action.kind != "stack":
        raise Unknown("is factored, and follows a rule that does more than stack or unstack")
    apart, stacked = (before, after) if isinstance(action, Gather) else (after, before)
    moved: list[int] = []
    if any(factored) and len(apart) > 1:
        moved = [axis + (axis >= action.axis) for axis in factored_axes(apart)]
        if tuple(moved) != factored_axes(stacked):
            raise Unknown(f"is factored along other axes before and after, {before} to {after}")
    if factored[0] != factored[1]:
        raise Unknown(f"is factored either before or after the rule, {before} to {after}")
    if field == "v" and not factored[0]:
        return (action,)
    if field == "v" or not factored[0]:
        return _placeholders(action)
    missing = moved[FACTORED.index(field)]
    axis = action.axis - (missing < action.axis)
    if isinstance(action, Gather):
        return (Gather("stack", axis, action.count, action.inner),)
    return (Spread("stack", axis, action.sizes),)


def _placeholders(action: Gather | Spread) -> tuple[Action, ...]:
    """The same for arrays that say nothing: as many as there are parameters, and all equal."""
    if isinstance(action, Gather):
        return (Agree((None,) * action.count, action.inner),)
    return (Copies((None,) * len(action.sizes)),)


def first_value(field: str, fill: Fill, spec: Spec) -> Fill:
    """What optax starts with for a new parameter. Raises `Unknown` for what it cannot tell.

    `fill`: how the parameter itself is filled; `spec`: of what the field keeps of it.
    """
    if field in COPIES:
        return replace(fill, spec=spec)
    if field in ZEROS:
        return Fill("zeros", 1.0, 0, fill.path, spec)
    raise Unknown(f"starts with a value that is not known: `{field}` is no moment that starts at 0")


def common_dtype(specs: Mapping[str, Spec], params: Mapping[str, Spec], new: Spec) -> object:
    """The dtype that some field has for a new parameter: as the parameter, or one for all."""
    if all(str(specs[path].dtype) == str(params[path].dtype) for path in specs):
        return new.dtype
    dtypes = {str(spec.dtype) for spec in specs.values()}
    if len(dtypes) > 1:
        raise Unknown(f"has several dtypes for other parameters: {', '.join(sorted(dtypes))}")
    return next(iter(specs.values())).dtype
