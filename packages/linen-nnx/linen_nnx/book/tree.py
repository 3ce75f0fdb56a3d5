"""Nested dicts to `/`-joined paths and back: the only tree form that the translator knows.

>>> flatten({"fc": {"kernel": 1, "bias": 2}, "layers": {0: {"scale": 3}}})
{'fc/kernel': 1, 'fc/bias': 2, 'layers/0/scale': 3}
>>> unflatten({"fc/kernel": 1, "layers/0/scale": 3})
{'fc': {'kernel': 1}, 'layers': {'0': {'scale': 3}}}
"""

from collections.abc import Iterable, Mapping
from typing import Any


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """`{"a": {"b": leaf}}` to `{"a/b": leaf}`, in the order of the tree.

    Integer keys become digits. Empty dicts hold no leaf and so leave no trace.

    Raises:
      ValueError: with every key that is no string or integer, is empty or holds a `/`, every pair
        of keys that would share a path, and every container that is no plain dict.
    """
    leaves: dict[str, Any] = {}
    problems: list[str] = []
    if not isinstance(tree, dict):
        problems.append(f"the tree is a {type(tree).__name__}, expected a dict")
    else:
        _walk(tree, "", leaves, problems)
    if problems:
        raise ValueError("The tree cannot be flattened: " + "; ".join(problems))
    return leaves


def _walk(tree: dict[Any, Any], prefix: str, leaves: dict[str, Any], problems: list[str]) -> None:
    # Names as text: 0 and "0" are two keys of a dict, and one path.
    seen: set[str] = set()
    for key, value in tree.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            problems.append(f"key {key!r} under `{prefix}` is a {type(key).__name__}")
            continue
        name = str(key)
        if not name or "/" in name:
            problems.append(f"key {name!r} under `{prefix}` is empty or holds a `/`")
        elif name in seen:
            problems.append(f"`{prefix}{name}` occurs twice, as integer and as text")
        elif isinstance(value, dict):
            _walk(value, f"{prefix}{name}/", leaves, problems)
        # A FrozenDict, a list, an empty state of optax: what they would come back as is not known.
        elif value is None or isinstance(value, (Mapping, list, tuple)):
            kind = type(value).__name__
            problems.append(f"`{prefix}{name}` is a {kind}: only dicts and leaves can be flattened")
        else:
            leaves[prefix + name] = value
        seen.add(name)


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": leaf}` to `{"a": {"b": leaf}}`; all keys are strings.

    Raises:
      ValueError: with every path that is empty, has an empty element, is a leaf and a branch at
        once, or holds a dict in place of a leaf.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        # "a//b" and "/a" would get a key of no text.
        if not name or not all(parents):
            problems.append(f"{path!r} has an empty element")
        elif isinstance(leaf, dict):
            problems.append(f"`{path}` holds a dict, expected a leaf")
        else:
            node: Any = tree
            for parent in parents:
                # None from the first leaf on that stands where a branch is needed.
                node = node.setdefault(parent, {}) if isinstance(node, dict) else None
            if isinstance(node, dict) and name not in node:
                node[name] = leaf
            else:
                problems.append(f"`{path}` is a leaf and a branch at once")
    if problems:
        raise ValueError("The paths do not form a tree: " + "; ".join(problems))
    return tree


def branches_of(paths: Iterable[str]) -> set[str]:
    """Every inner node above some paths.

    Example:
      >>> sorted(branches_of(["a/b/kernel", "a/bias"]))
      ['a', 'a/b']
    """
    found: set[str] = set()
    for path in paths:
        node = path.rpartition("/")[0]
        # Above a node that is known, all are.
        while node and node not in found:
            found.add(node)
            node = node.rpartition("/")[0]
    return found
