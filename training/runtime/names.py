"""Names of leaves of any pytree, as checkpoints and messages have them."""

from typing import Any

import jax


def path_name(path: Any) -> str:
    """A key path of jax's, whatever the containers: `a/0/b`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by `path_name`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
