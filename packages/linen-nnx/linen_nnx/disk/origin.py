"""Where a converted checkpoint came from, as its report says: what the way back restores by it.

The tree of the result alone does not say which keys of the source were indices of a tuple, where
a chain of optax had empty states, and which dtype the step had. So a report lists every leaf of the
source with these, as `Conversion.origin` writes them:

    path                      kinds of its keys    type          dtype, of a scalar
    opt_state/0/count         2, 1, 2              jax.Array     int32
    opt_state/1               2, 1                 NamedTuple    null
    step                      2                    scalar        int64
"""

from typing import Any, NamedTuple

from linen_nnx.book.reading import read_json
from linen_nnx.book.specs import Spec
from linen_nnx.disk import checked
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.conversion import REPORT
from linen_nnx.disk.leaves import DICT, SEQUENCE, Leaf, make_key
from linen_nnx.disk.sources import Source
from linen_nnx.disk.state import Form
from linen_nnx.disk.zarr_metadata import fresh_metadata


class Origin(NamedTuple):
    """The trees that a converted checkpoint came from, as its report describes them."""

    leaves: list[Leaf]
    beside: dict[str, list[Leaf]]
    """The leaves of the items beside the training state's, by the item's name."""


def origin_of(source: Source, to: Form) -> Origin | None:
    """Where a converted checkpoint came from, if it goes back there.

    Raises `StoreError` for a report that is damaged: without it the way back would end elsewhere.
    """
    path = source.folder / REPORT
    if not path.is_file():
        return None
    try:
        report = read_json(path)
        origin = report.get("origin") if isinstance(report, dict) else None
        if origin is None or to.stage or checked.field(origin, "side") != to.side:
            return None
        # Reports of before items were converted together say nothing of them.
        beside = checked.mapping(origin.get("beside", {}))
        return Origin(_leaves(origin), {name: _leaves(one) for name, one in beside.items()})
    except ValueError as error:
        fix = "delete it, and give the tree of the result with --like"
        raise StoreError(f"{path} is damaged ({error}): {fix}") from None


def _leaves(origin: Any) -> list[Leaf]:
    """The leaves of a tree as `Conversion.origin` describes it."""
    return [_origin_leaf(entry) for entry in checked.sequence(checked.field(origin, "leaves"))]


def _origin_leaf(entry: Any) -> Leaf:
    """A leaf as `Conversion.origin` describes it. Raises `ValueError` for anything else."""
    if len(checked.sequence(entry)) != 4:
        raise ValueError(f"a leaf has {len(entry)} values, expected 4")
    path, kinds, value_type, dtype = entry
    names = [checked.name(name) for name in checked.text(path).split("/")]
    if len(checked.sequence(kinds)) != len(names):
        raise ValueError(f"{checked.shown(path)} has {len(kinds)} kinds of keys")
    keys = []
    for name, kind in zip(names, kinds, strict=True):
        keys.append(make_key(name, checked.integer(kind, SEQUENCE, DICT)))
    # Of an array only its place is wanted. Of a scalar the dtype is, and so it gets metadata.
    metadata = None
    if dtype is not None:
        metadata = fresh_metadata(Spec((), checked.dtype_name(dtype)), zarr3=False)
    return Leaf(tuple(keys), checked.text(value_type), zarr=metadata)
