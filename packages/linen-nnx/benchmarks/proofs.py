"""Counts the CPU seconds of `suggest` and `verify`, and the memory that `suggest` needs.

    python -m benchmarks.proofs [--json FILE] [NAME ...]

`vit` has 3 layers and 4 heads, `convnext` 92 leaves, both of toy widths, where compiling is all
that costs; `wide` has 64 MB of parameters, where memory is, `wider` 268 MB, and `halves` is a
`wide` whose nnx layers are written so that only the gradients of whole leaves tell. Each figure
is of a process of its own, in seconds of CPU time (user), which a busy machine changes least, and
of the call alone.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.rounds import save, table

ROOT = Path(__file__).parent.parent


def vit() -> Any:
    """(2, 8, 8, 3) to (2, 10): patches, 3 layers of attention and MLP, a class token."""
    import jax.numpy as jnp
    from flax import linen as nn
    from flax import nnx

    from linen_nnx import Twin

    width, depth, heads = 16, 3, 4

    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.LayerNorm(name="norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(heads, name="attention")(y)
            y = nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm2")(x))
            return x + nn.Dense(width, name="down")(nn.gelu(y))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, images: Any) -> Any:
            x = nn.Conv(width, (4, 4), strides=4, name="patches")(images)
            x = x.reshape(len(x), -1, width)
            token = self.param("token", nn.initializers.normal(), (1, 1, width))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
            x = x + self.param("places", nn.initializers.normal(), (1, x.shape[1], width))
            for k in range(depth):
                x = LinenBlock(name=f"layer_{k}")(x)
            return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.patches = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
            self.token = nnx.Param(jnp.zeros((1, 1, width)))
            self.places = nnx.Param(jnp.zeros((1, 5, width)))
            self.blocks = nnx.List([Block(rngs) for _ in range(depth)])
            self.norm = nnx.LayerNorm(width, rngs=rngs)
            self.head = nnx.Linear(width, 10, rngs=rngs)

        def __call__(self, images: Any) -> Any:
            x = self.patches(images).reshape(len(images), -1, width)
            x = jnp.concatenate([jnp.tile(self.token[...], (len(x), 1, 1)), x], 1)
            x = x + self.places[...]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    return Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.ones((2, 8, 8, 3)),), **_adam())


def convnext() -> Any:
    """(2, 16, 16, 3) to (2, 10): a stem and 8 blocks in 4 stages, 92 leaves."""
    import jax.numpy as jnp
    from flax import linen as nn
    from flax import nnx

    from linen_nnx import Twin

    widths, depths = (4, 8, 12, 16), (2, 2, 2, 2)

    class LinenBlock(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            w = self.width
            y = nn.Conv(w, (7, 7), feature_group_count=w, padding="SAME", name="spatial")(x)
            y = nn.Dense(4 * w, name="up")(nn.LayerNorm(name="norm")(y))
            y = nn.Dense(w, name="down")(nn.gelu(y))
            return x + y * self.param("gamma", nn.initializers.ones, (w,))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(widths[0], (2, 2), strides=2, name="stem")(x)
            x = nn.LayerNorm(name="stem_norm")(x)
            for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
                if stage:
                    x = nn.LayerNorm(name=f"norm_{stage}")(x)
                    x = nn.Conv(width, (2, 2), strides=2, name=f"reduce_{stage}")(x)
                for k in range(depth):
                    x = LinenBlock(width, name=f"stage_{stage}_{k}")(x)
            x = nn.LayerNorm(name="head_norm")(x.mean((1, 2)))
            return nn.Dense(10, name="head")(x)

    class Block(nnx.Module):
        def __init__(self, width: int, rngs: nnx.Rngs) -> None:
            groups = {"feature_group_count": width, "padding": "SAME"}
            self.spatial = nnx.Conv(width, width, (7, 7), rngs=rngs, **groups)
            self.norm = nnx.LayerNorm(width, rngs=rngs)
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)
            self.gamma = nnx.Param(jnp.ones(width))

        def __call__(self, x: Any) -> Any:
            y = self.down(nnx.gelu(self.up(self.norm(self.spatial(x)))))
            return x + y * self.gamma[...]

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stem = nnx.Conv(3, widths[0], (2, 2), strides=2, rngs=rngs)
            self.stem_norm = nnx.LayerNorm(widths[0], rngs=rngs)
            self.norms, self.reduces, self.stages = nnx.List(), nnx.List(), nnx.List()
            for before, width in itertools.pairwise(widths):
                self.norms.append(nnx.LayerNorm(before, rngs=rngs))
                self.reduces.append(nnx.Conv(before, width, (2, 2), strides=2, rngs=rngs))
            for width, depth in zip(widths, depths, strict=True):
                self.stages.append(nnx.List([Block(width, rngs) for _ in range(depth)]))
            self.head_norm = nnx.LayerNorm(widths[-1], rngs=rngs)
            self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.stem_norm(self.stem(x))
            for number, blocks in enumerate(self.stages):
                if number:
                    x = self.reduces[number - 1](self.norms[number - 1](x))
                for block in blocks:
                    x = block(x)
            return self.head(self.head_norm(x.mean((1, 2))))

    return Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.ones((2, 16, 16, 3)),), **_adam())


def wide(width: int = 1024, in_halves: bool = False) -> Any:
    """(2, width) to the same: 16 layers of width by width, at 1024 64 MB of parameters."""
    import jax.numpy as jnp
    from flax import linen as nn
    from flax import nnx

    from linen_nnx import Twin

    depth = 16

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for k in range(depth):
                x = nn.gelu(nn.Dense(width, name=f"layer_{k}")(x))
            return x

    class Halves(nnx.Linear):
        def __call__(self, x: Any) -> Any:
            assert self.bias is not None
            half, kernel = width // 2, self.kernel[...]
            return x[:, :half] @ kernel[:half] + x[:, half:] @ kernel[half:] + self.bias[...]

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            kind = Halves if in_halves else nnx.Linear
            self.layers = nnx.List([kind(width, width, rngs=rngs) for _ in range(depth)])

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = nnx.gelu(layer(x))
            return x

    return Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.ones((2, width)),), **_adam())


def _adam() -> dict[str, Any]:
    import optax

    return {"optimizer": optax.adam(1e-3)}


TWINS: Mapping[str, Callable[[], Any]] = {
    "vit": vit,
    "convnext": convnext,
    "wide": wide,
    "wider": lambda: wide(2048),
    "halves": lambda: wide(in_halves=True),
}


def point(name: str) -> dict[str, float]:
    """One twin, in a process of its own: `suggest`, then a conversion, then `verify` of it."""
    import jax
    import orbax.checkpoint as ocp

    from linen_nnx import convert, suggest, verify
    from linen_nnx.infer.trace import trace_linen

    twin = TWINS[name]()
    trace = trace_linen(twin)
    size = sum(leaf.dtype.itemsize * _count(leaf.shape) for leaf in trace.leaves.values())
    before, start = _memory(), _seconds()
    book = suggest(twin)
    found = {
        "leaves": len(trace.leaves),
        "open": len(book.unassigned),
        "suggest, s": _seconds() - start,
        "memory / parameters": (_memory() - before) / size,
    }
    if name not in ("vit", "convnext"):
        return found
    with tempfile.TemporaryDirectory() as folder:
        book.save(f"{folder}/rules.yaml")
        params = _nested(trace.construct(0))["params"]
        state = {"params": params, "opt_state": twin.optimizer.init(params), "step": 0}
        ocp.PyTreeCheckpointer().save(f"{folder}/linen", state)
        convert(f"{folder}/linen", f"{folder}/nnx", "nnx", rules=f"{folder}/rules.yaml")
        jax.clear_caches()
        start = _seconds()
        checks = verify(f"{folder}/linen", f"{folder}/nnx", twin=TWINS[name]())
        found["verify, s"] = _seconds() - start
        found["failed"] = sum(check.passed is False for check in checks)
    return found


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _nested(leaves: Mapping[str, Any]) -> Any:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def _memory() -> float:
    """Bytes, at the peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def child(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.proofs", "--point", name]
    where = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=where, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which twins; default: all")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--point", choices=TWINS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options.point)))
        return
    found = {name: child(name) for name in options.names or TWINS}
    columns = list(dict.fromkeys(key for figures in found.values() for key in figures))
    rows = [["", *columns]]
    for name, figures in found.items():
        rows.append([name, *(f"{figures[key]:.3g}" if key in figures else "" for key in columns)])
    table("suggest and verify", rows)
    save(options.json, found)


if __name__ == "__main__":
    main()
