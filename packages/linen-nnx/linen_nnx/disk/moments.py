"""What a rule for a parameter means for an array that an optimizer keeps of that parameter.

Four leaves that optax keeps of two kernels (8, 4), which a rule stacks to one parameter (2, 8, 4)
with `stack` along axis 0; the second kernel's are like the first's:

    Adam         mu       (8, 4)        as the kernels themselves                (2, 8, 4)
    L-BFGS       memory   (10, 8, 4)    the same, behind an axis of its own      (10, 2, 8, 4)
    Adafactor    v_row    (4,)          the mean along the axis of length 8      (2, 4)
    Adafactor    v        (1,)          a placeholder: factored, it is not used  (1,)

So the action for `mu` is the rule's own, for the memory it is shifted by one axis, for `v_row` it
stacks vectors, and the two placeholders must be equal and become one:

    >>> stack = Gather("stack", axis=0, count=2, inner=1)
    >>> shifted([stack], lead=(10,))
    (Gather(kind='stack', axis=1, count=2, inner=1),)
    >>> factored_actions("v_row", [stack], (8, 4), (2, 8, 4), (True, True))
    (Gather(kind='stack', axis=0, count=2, inner=1),)
    >>> factored_actions("v", [stack], (8, 4), (2, 8, 4), (True, True))
    (Agree(perms=(None, None), inner=1),)

SM3 keeps the maximum of each axis, and NovoGrad the norm of each array. What they would have kept
of the stack does not follow from what they kept of the layers: these are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from linen_nnx.book.actions import Action, Agree, Copies, Fill, Gather, Permute, Reform, Spread
from linen_nnx.book.specs import Spec

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
    """The same actions on arrays that have the axes `lead` in front.

    Example:
      >>> shifted([Permute((1, 0)), Reform(((32,),))], lead=(10,))
      (Permute(perm=(0, 2, 1)), Reform(shapes=((10, 32),)))
    """
    return tuple(_shifted(action, lead) for action in actions)


def _shifted(action: Action, lead: Shape) -> Action:
    count = len(lead)
    match action:
        case Gather():
            return replace(action, axis=action.axis + count)
        case Spread():
            return replace(action, axis=action.axis + count)
        case Permute():
            return Permute(_behind(count, action.perm))
        case Copies() | Agree():
            perms = tuple(perm if perm is None else _behind(count, perm) for perm in action.perms)
            return replace(action, perms=perms)
        case Reform():
            return Reform(tuple((*lead, *shape) for shape in action.shapes))
    # What is left looks at no axis: scaling, filling, casting.
    return action


def _behind(count: int, perm: tuple[int, ...]) -> tuple[int, ...]:
    """A permutation of axes that leaves some in front where they are."""
    return (*range(count), *(axis + count for axis in perm))


def common_lead(pairs: Sequence[tuple[Shape, Shape]]) -> Shape | None:
    """The axes that every array has in front of its parameter's; None if there are no such.

    Args:
      pairs: the shape of each array, and that of its parameter.

    Example:
      >>> common_lead([((10, 8, 4), (8, 4)), ((10, 4), (4,))])
      (10,)
      >>> common_lead([((8, 4), (8, 4)), ((4,), (4,))])
    """
    # Of a parameter () every array looks like a lead: (3,) may be a memory of three steps, or a
    # statistic. With scalars alone nothing is known.
    if not any(own for _, own in pairs):
        return None
    leads = set()
    for shape, own in pairs:
        start = len(shape) - len(own)
        if shape[start:] != own:
            return None
        leads.add(shape[:start])
    return leads.pop() or None if len(leads) == 1 else None


@dataclass(frozen=True)
class Factoring:
    """How one optimizer factors: which parameters, and from which length on.

    Optax factors a parameter of two or more axes if the second longest is at least
    `min_dim_size_to_factor`. A checkpoint does not hold that number, but bounds for it.
    """

    at_least: int
    """The second longest axis of a parameter that is not factored: the number is larger."""
    at_most: int | None
    """The second longest axis of a parameter that is factored: the number is not larger. None if
    none is factored."""

    @classmethod
    def of(cls, params: Sequence[Shape], kept: Sequence[Shape]) -> "Factoring":
        """The bounds that some parameters show.

        Args:
          params: their shapes.
          kept: the shape of what `v` keeps of each: that of a parameter that is not factored.

        Example:
          >>> Factoring.of([(512, 256), (64, 32), (64,)], [PLACEHOLDER, (64, 32), (64,)])
          Factoring(at_least=32, at_most=256)
        """
        whole, split = [0], []
        for own, shape in zip(params, kept, strict=True):
            if len(own) < 2:
                continue  # never factored, whatever the number is
            seconds = whole if shape == own else split
            seconds.append(_second_longest(own))
        return cls(max(whole), min(split, default=None))

    def factors(self, shape: Shape, notes: list[str], name: str) -> bool:
        """Whether a parameter of this shape is factored; `notes` gets what is assumed."""
        if len(shape) < 2 or _second_longest(shape) <= self.at_least:
            return False
        at_most = _DEFAULT_LIMIT if self.at_most is None else self.at_most
        if _second_longest(shape) >= at_most:
            return True
        # Between the bounds, nothing in the checkpoint tells.
        notes.append(
            f"the moments of `{name}` {list(shape)} are taken for not factored: that needs a "
            f"min_dim_size_to_factor above {_second_longest(shape)}"
        )
        return False


def _second_longest(shape: Shape) -> int:
    return sorted(shape)[-2]


def factored_axes(shape: Shape) -> tuple[int, int]:
    """The axes that `v_row` and `v_col` lack: the longest and the second longest.

    Example:
      >>> factored_axes((2, 8, 4))
      (1, 2)
    """
    # Of axes of one length the last counts as the longest, as in optax, which sorts likewise.
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
    lacked: tuple[int, ...] = ()  # the axes that `v_row` and `v_col` lack of the stack
    if any(factored) and len(apart) > 1:
        # An axis of one layer is one further in the stack, if the stack's own comes before it.
        lacked = tuple(axis + (axis >= action.axis) for axis in factored_axes(apart))
        # 300 layers of (256, 128): the stack's own axis is its longest, and a mean over layers is
        # in no layer's moments.
        if lacked != factored_axes(stacked):
            raise Unknown(f"is factored along other axes before and after, {before} to {after}")
    if factored[0] != factored[1]:
        raise Unknown(f"is factored either before or after the rule, {before} to {after}")
    if field == "v" and not factored[0]:
        return (action,)
    if field == "v" or not factored[0]:
        return _placeholders(action)
    # Where the axis that is missing in this field came before the stack's, that one moves up.
    missing = lacked[FACTORED.index(field)]
    return (replace(action, axis=action.axis - (missing < action.axis)),)


def _placeholders(action: Gather | Spread) -> tuple[Action, ...]:
    """The action for arrays that say nothing: one for each parameter, and all equal."""
    if isinstance(action, Gather):
        return (Agree((None,) * action.count, action.inner),)
    return (Copies((None,) * len(action.sizes)),)


def first_value(field: str, fill: Fill, spec: Spec) -> Fill:
    """What optax starts with for a new parameter. Raises `Unknown` for what it cannot tell.

    Args:
      field: the name of what is kept.
      fill: how the parameter itself is filled.
      spec: shape and dtype of what the field keeps of it.
    """
    if field in COPIES:
        return replace(fill, spec=spec)
    if field in ZEROS:
        return Fill("zeros", 1.0, 0, fill.path, spec)
    raise Unknown(f"starts with a value that is not known: `{field}` is no moment that starts at 0")


def common_dtype(pairs: Sequence[tuple[Spec, Spec]], new: Spec) -> object:
    """The dtype that a field has for a new parameter: that of the parameter, or one for all.

    Optax's `mu_dtype=bfloat16` gives every `mu` that dtype, whatever its parameter's is.

    Args:
      pairs: what the field keeps of each other parameter, and that parameter.
      new: the new parameter.

    Raises:
      Unknown: if the field has several dtypes, and they are not those of the parameters.

    Example:
      >>> mu, kernel = Spec((8, 4), "bfloat16"), Spec((8, 4), "float32")
      >>> common_dtype([(mu, kernel)], Spec((4,), "float32"))
      'bfloat16'
    """
    dtypes = {str(kept.dtype): kept.dtype for kept, _ in pairs}
    if all(str(kept.dtype) == str(own.dtype) for kept, own in pairs):
        return new.dtype
    if len(dtypes) > 1:
        raise Unknown(f"has several dtypes for other parameters: {', '.join(sorted(dtypes))}")
    return next(iter(dtypes.values()))
