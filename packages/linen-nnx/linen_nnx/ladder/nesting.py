"""Two optimizer states that are nested in different ways, and are the same chain all the same.

The states of `optax.chain(clip, adamw(schedule))`, and of a chain of the parts that adamw has:

    (Empty, (Adam, Empty, Schedule))            (Empty, Adam, Empty, Schedule)
    1/0/count, 1/0/mu/..., 1/0/nu/...           1/count, 1/mu/..., 1/nu/...
    1/2/count                                   3/count

A chain in a chain does what one long chain does, and empty states hold nothing. So both are
straightened: the states that hold something are numbered in their order. Both then have `0/count`,
`0/mu`, `0/nu` and `1/count`, and each field of the one is known in the other:

    >>> import numpy as np
    >>> scalar, kernel = np.zeros(()), np.zeros((2, 3))
    >>> chain = {"1/0/count": scalar, "1/0/mu/up": kernel, "1/0/nu/up": kernel, "1/2/count": scalar}
    >>> parts = {"1/count": scalar, "1/mu/up": kernel, "1/nu/up": kernel, "3/count": scalar}
    >>> for old, new in sorted(renamed(chain, parts, ["up"], ["up"]).items()):
    ...     print(old, "->", new)
    1/0/count -> 1/count
    1/0/mu -> 1/mu
    1/0/nu -> 1/nu
    1/2/count -> 3/count
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from linen_nnx.book.plan import RuleError
from linen_nnx.book.specs import Spec
from linen_nnx.disk.mirrors import find_mirrors
from linen_nnx.disk.state import Id

_Trie = dict[str, Any]


def renamed(
    there: Mapping[str, Any],
    due: Mapping[str, Any],
    params_there: Collection[str],
    params_due: Collection[str],
) -> dict[str, str]:
    """Where each field of an optimizer's state is in one that is nested otherwise.

    Args:
      there: the leaves of the one state by path, each with shape and dtype; `due`: those of the
        other.
      params_there: the paths of the parameters that the one is for; `params_due`: of the other.

    Returns:
      `{"1/2/count": "3/count", "1/0/mu": "1/mu"}`: a field may be a tree like the parameters.

    Raises:
      RuleError: showing both, where they are not the same chain.

    Example:
      >>> import numpy as np
      >>> one, two = {"1/0/count": np.zeros(())}, {"0/0/count": np.zeros(())}
      >>> renamed(one, two, [], [])
      {'1/0/count': '0/0/count'}
    """
    old = _straightened(there, params_there)
    new = _straightened(due, params_due)
    if old.keys() == new.keys():
        return {path: new[name] for name, path in old.items()}
    text = f"the optimizer's state is {_shown(old)}; here it is {_shown(new)}"
    if any(name.split("/")[-1] == "count" for name in old.keys() ^ new.keys()):
        text += (
            ". A state of `count` alone is a schedule's; a learning rate that is a number has none"
        )
    raise RuleError("The optimizers differ", [text])


def _straightened(leaves: Mapping[str, Any], params: Collection[str]) -> dict[str, str]:
    """`{path of a field in one long chain: its path}`, in the chain's order."""
    specs = {path: Spec.of(leaf) for path, leaf in leaves.items()}
    known = {path: Id("params", path) for path in params}
    mirrors, others = find_mirrors(specs, {"params": known})
    # A moment is one field, however many parameters there are.
    fields = [path for path, _ in mirrors] + list(others)
    trie: _Trie = {}
    for field in fields:
        node = trie
        for name in field.split("/"):
            node = node.setdefault(name, {})
    return dict(_numbered(trie, "", ""))


def _numbered(node: _Trie, path: str, new: str) -> Iterator[tuple[str, str]]:
    """The fields below a node at `path`: each one's path in one long chain, and its path."""
    if not node:
        yield new, path
    elif _is_chain(node):
        members = list(_members(node, path))
        for number, (at, member) in enumerate(members):
            # A chain of one is that one itself.
            yield from _numbered(member, at, new if len(members) == 1 else _join(new, str(number)))
    else:
        for name, child in node.items():
            yield from _numbered(child, _join(path, name), _join(new, name))


def _members(node: _Trie, path: str) -> Iterator[tuple[str, _Trie]]:
    """The states in a chain, those of chains in it among them, in order."""
    for name in sorted(node, key=int):
        at, child = _join(path, name), node[name]
        if _is_chain(child):
            yield from _members(child, at)
        else:
            yield at, child


def _is_chain(node: _Trie) -> bool:
    # The state of a transformation has named fields; only a tuple has numbers alone.
    return bool(node) and all(name.isdigit() for name in node)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _shown(straight: dict[str, str]) -> str:
    """The states by their places, each with its fields: `1/0 (count, mu, nu), 1/2 (count)`."""
    states: dict[str, list[str]] = {}
    for path in straight.values():
        place, _, name = path.rpartition("/")
        states.setdefault(place, []).append(name)
    texts: list[str] = []
    for place, names in states.items():
        texts.append(f"{place or '.'} ({', '.join(sorted(names))})")
    return ", ".join(texts) or "nothing"
