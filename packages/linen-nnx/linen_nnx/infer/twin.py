"""A twin: one model written in both frameworks, with an example of its inputs.

    twin = Twin(linen=lambda: MyLinen(cfg), nnx=lambda rngs: MyNnx(cfg, rngs=rngs),
                inputs=lambda: (x,))

A twin is code alone: no weights. What is done with it starts from its traces (`trace.py`). The
twin that the pages of this package draw is in `example.py`.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import nnx

from linen_nnx.errors import Refusal


class TwinError(Refusal):
    """A twin that cannot be loaded, built or traced; the message says which part and why."""


@dataclass(frozen=True)
class Twin:
    """Both sides of one model. Only `linen`, `nnx` and `inputs` are needed.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> twin = Twin(
        ...     linen=lambda: nn.Dense(3),
        ...     nnx=lambda rngs: nnx.Linear(2, 3, rngs=rngs),
        ...     inputs=lambda: (jnp.ones((1, 2)),),
        ... )

    Attributes:
      linen: `() -> nn.Module`.
      nnx: `(rngs) -> nnx.Module`.
      inputs: `() -> tuple`, the arguments of one call; arrays and, if need be, plain values.
      call_linen: `(module, variables, *inputs) -> outputs`; default: `module.apply(variables,
        *inputs)`. It may return `(outputs, updated collections)`, as `apply` with `mutable` does.
      call_nnx: `(model, *inputs) -> outputs`; default: `model(*inputs)`.
      init_linen: `(module, key, *inputs) -> variables`; default: `module.init(key, *inputs)`.
      optimizer: the optax transformation that trained them; only `verify` uses it, for a step.
    """

    linen: Callable[[], Any]
    nnx: Callable[[nnx.Rngs], Any]
    inputs: Callable[[], tuple[Any, ...]]
    call_linen: Callable[..., Any] | None = None
    call_nnx: Callable[..., Any] | None = None
    init_linen: Callable[..., Any] | None = None
    optimizer: Any = None

    @classmethod
    def load(cls, where: str) -> "Twin":
        """The twin at `path/to/file.py:NAME` or `package.module:NAME`.

        Raises:
          TwinError: when the text, the file, the module or the name is wrong, or it is no `Twin`.
        """
        # From the right: a path may have a colon of its own (`C:/models.py:TWIN`).
        source, colon, name = where.rpartition(":")
        if not colon or not source or not name:
            raise TwinError(
                f"a twin is given as `path/to/file.py:NAME` or `package.module:NAME`, got {where!r}"
            )
        module = _module(source)
        try:
            twin = getattr(module, name)
        except AttributeError as error:
            if hasattr(module, "__getattr__"):  # it makes its twins, and says what it lacks
                raise TwinError(f"{source} has no `{name}`: {error}") from None
            known = [key for key, value in vars(module).items() if isinstance(value, cls)]
            near = difflib.get_close_matches(name, known, n=1) or known[:1]
            hint = f"; did you mean `{near[0]}`?" if near else "; it holds no Twin at all"
            raise TwinError(f"{source} has no `{name}`{hint}") from None
        if not isinstance(twin, cls):
            raise TwinError(f"`{name}` in {source} is a {type(twin).__name__}, expected a Twin")
        return twin


def attempt(part: str, function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns.

    Raises:
      TwinError: if it raises; the message names the part of the twin, and says what was raised.

    Example:
        >>> try:
        ...     attempt("inputs() of the twin", lambda: 1 / 0)
        ... except TwinError as error:
        ...     print(error)
        inputs() of the twin failed: ZeroDivisionError: division by zero
    """
    try:
        return function(*args)
    except TwinError:  # it names the part already, more exactly
        raise
    except Exception as error:  # the user's own code: whatever it raises, say where
        raise TwinError(f"{part} failed: {type(error).__name__}: {error}") from error


def _module(source: str) -> ModuleType:
    """The module of a path or a dotted name, imported."""
    path = Path(source)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise TwinError(f"there is no file {source}")
    # The code can import its neighbours, as under `python -m module` and `python file.py`.
    folders = [str(path.resolve().parent)] * is_file + [str(Path.cwd())]
    sys.path[:0] = folders
    try:
        if not is_file:
            return attempt(f"import of the module `{source}`", importlib.import_module, source)
        name = f"_twin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        attempt(f"import of the file {source}", spec.loader.exec_module, module)
        return module
    finally:
        for folder in folders:
            sys.path.remove(folder)
