"""Random models in both frameworks: one graph, run in two orders, its leaves stored in two ways.

With `rewritten`, the nnx side also computes many of its nodes in another way: rotations by whole or
by halves, scales before or after a product, one fused product for several, other orders of sums.
"""

import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from linen_nnx import Twin

D = 4
# op: number of inputs, shapes of its leaves
OPS = {
    "dense": (1, [(D, D)]),
    "affine": (1, [(D, D), (D,)]),
    "scale": (1, [(D,)]),
    "bias": (1, [(D,)]),
    "norm": (1, [(D,), (D,)]),
    "attend": (1, [(D, D), (D,)] * 4),
    "gated": (1, [(D, D)] * 3),
    "add": (2, []),
    "sub": (2, []),
    "mul": (2, []),
    "tanh": (1, []),
    "relu": (1, []),
}

# What is more often written in several ways.
MORE = {
    "rotary": (1, [(D, D)] * 4),
    "tempered": (1, [(D, D), (1,)]),
    "joined": (2, [(D, D)] * 2),
    "add3": (3, []),
}


def rotated(x, by_halves):
    """Rotary embedding of (length, D), as Hugging Face or as Gemma and MaxText write it."""
    at = jnp.arange(x.shape[0])[:, None] * 10.0 ** -jnp.arange(D // 2)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(at), jnp.sin(at)
    if by_halves:
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    cos, sin = (jnp.concatenate([part, part], -1) for part in (cos, sin))
    return x * cos + jnp.concatenate([-b, a], -1) * sin


def compute_otherwise(op, a, w):
    """The same function as `compute`, in other equations."""
    x = a[0]
    match op:
        case "dense":
            return jnp.einsum("...i,io->...o", x, w[0])
        case "affine":
            return w[1] + jnp.tensordot(x.reshape(-1, 1, D), w[0], 1).reshape(x.shape)
        case "norm":
            mean = x.mean(-1, keepdims=True)
            scale = w[0] / jnp.sqrt((x * x).mean(-1, keepdims=True) - mean * mean + 1e-6)
            return w[1] + x * scale - mean * scale
        case "attend":
            fused = x @ jnp.concatenate(w[0:6:2], -1) + jnp.concatenate(w[1:6:2])
            q, k, v = jnp.split(fused, 3, axis=-1)
            return w[7] + jax.nn.softmax((q * 0.5) @ k.T) @ v @ w[6]
        case "gated":
            gate, value = jnp.split(x @ jnp.concatenate(w[:2], -1), 2, axis=-1)
            return (value * jax.nn.silu(gate)) @ w[2]
        case "rotary":
            q, k, v = jnp.split(x @ jnp.concatenate(w[:3], -1), 3, axis=-1)
            scores = jnp.einsum("qd,kd->qk", rotated(q, True), rotated(k, True))
            return jnp.einsum("qk,kd->qd", jax.nn.softmax(scores * 0.5), v) @ w[3]
        case "tempered":
            return (x * w[1]) @ w[0]
        case "joined":
            return jnp.concatenate(a, -1) @ jnp.concatenate(w, 0)
        case "add3":
            return x + (a[1] + a[2])
        case "add" | "mul":
            return compute(op, a[::-1], w)
    return compute(op, a, w)


def compute(op, a, w):
    x = a[0]
    match op:
        case "dense" | "affine":
            return x @ w[0] + (w[1] if len(w) > 1 else 0)
        case "scale":
            return x * w[0]
        case "bias":
            return x + w[0]
        case "norm":
            spread = x - x.mean(-1, keepdims=True)
            return spread * jax.lax.rsqrt((spread**2).mean(-1, keepdims=True) + 1e-6) * w[0] + w[1]
        case "attend":
            q, k, v = (x @ w[2 * n] + w[2 * n + 1] for n in range(3))
            return jax.nn.softmax(q @ k.T / 2) @ v @ w[6] + w[7]
        case "gated":
            return (jax.nn.silu(x @ w[0]) * (x @ w[1])) @ w[2]
        case "rotary":
            q, k = (rotated(x @ w[n], False) for n in range(2))
            return jax.nn.softmax(q @ k.T / 2) @ (x @ w[2]) @ w[3]
        case "tempered":
            return (x @ w[0]) * w[1]
        case "joined":
            return x @ w[0] + a[1] @ w[1]
        case "add3":
            return x + a[1] + a[2]
        case "add":
            return x + a[1]
        case "sub":
            return x - a[1]
        case "mul":
            return x * a[1]
    return {"tanh": jnp.tanh, "relu": jax.nn.relu}[op](x)


def random_twin(seed, rewritten=False):
    """A twin; the true map of leaves; and both models as functions of leaves and inputs."""
    r = random.Random(seed)
    kinds = OPS | MORE if rewritten else OPS
    nodes = [("input", []), ("input", [])]
    for _ in range(r.randint(3, 10)):
        op = r.choice(list(kinds))
        near = [max(r.randrange(len(nodes)) for _ in range(2)) for _ in range(kinds[op][0])]
        nodes.append((op, near))
    if all(not kinds[op][1] for op, _ in nodes[2:]):
        nodes.append(("affine", [len(nodes) - 1]))
    shapes = {
        (k, n): shape
        for k, (op, _) in enumerate(nodes[2:], start=2)
        for n, shape in enumerate(kinds[op][1])
    }
    words = [a + b for a in "pqrst" for b in "abcdefghijklmnopqrstuvwxyz"]
    name = dict(zip(shapes, r.sample(words, len(shapes)), strict=True))
    stored, place = store(r, shapes, r.sample(words, len(shapes)))
    orders = [topological(r, nodes) for _ in range(2)]
    other = {k for k in range(len(nodes)) if rewritten and r.random() < 0.7}

    def take(leaves, key):
        leaf, kind, k = place[key]
        width = shapes[key][-1]
        parts = {"plain": lambda w: w, "turned": lambda w: w.T, "stacked": lambda w: w[k]}
        parts["joined"] = lambda w: w[..., k * width : (k + 1) * width]
        return parts[kind](leaves[leaf])

    def truth(leaves):
        joins = {"plain": lambda w: w[0], "turned": lambda w: w[0].T, "stacked": np.stack}
        joins["joined"] = lambda w: np.concatenate(w, -1)
        return {
            leaf: joins[kind]([leaves[f"params/{name[key]}"] for key in members])
            for leaf, (kind, members, _) in stored.items()
        }

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, *inputs):
            normal = nn.initializers.normal()
            w = {key: self.param(name[key], normal, shape) for key, shape in shapes.items()}
            return run(nodes, orders[0], inputs, w.__getitem__, ())

    class Nnx(nnx.Module):
        def __init__(self):
            for leaf, (_, _, shape) in stored.items():
                setattr(self, leaf, nnx.Param(jnp.zeros(shape)))

        def __call__(self, *inputs):
            w = {leaf: getattr(self, leaf)[...] for leaf in stored}
            return run(nodes, orders[1], inputs, lambda key: take(w, key), other)

    def call_linen(leaves, *inputs):
        return run(nodes, orders[0], inputs, lambda key: leaves[f"params/{name[key]}"], ())

    def call_nnx(leaves, *inputs):
        return run(nodes, orders[1], inputs, lambda key: take(leaves, key), other)

    twin = Twin(Linen, lambda rngs: Nnx(), lambda: (jnp.ones((5, D)), jnp.ones((5, D))))
    return twin, truth, call_linen, call_nnx


def run(nodes, order, inputs, leaf, other):
    """`other`: the nodes that are computed in other equations."""
    values = dict(enumerate(inputs))
    for k in order:
        op, near = nodes[k]
        weights = [leaf((k, n)) for n in range(len((OPS | MORE)[op][1]))]
        form = compute_otherwise if k in other else compute
        values[k] = form(op, [values[n] for n in near], weights)
    used = {n for _, near in nodes for n in near}
    return [values[k] for k in range(2, len(nodes)) if k not in used]


def topological(r, nodes):
    done, order = {0, 1}, []
    while len(done) < len(nodes):
        ready = [k for k, (_, near) in enumerate(nodes) if k not in done and set(near) <= done]
        order.append(r.choice(ready))
        done.add(order[-1])
    return order


def store(r, shapes, names):
    """Random nnx leaves: {leaf: (kind, members, shape)}, and {member: (leaf, kind, position)}."""
    free, stored = r.sample(list(shapes), len(shapes)), {}
    while free:
        first = free.pop()
        shape, kind = shapes[first], r.choice(["plain", "plain", "turned", "stacked", "joined"])
        members = [first]
        if kind in ("stacked", "joined"):
            members += [key for key in free if shapes[key] == shape][: r.randint(1, 3)]
        free = [key for key in free if key not in members]
        full = {"plain": shape, "turned": shape[::-1], "stacked": (len(members), *shape)}
        full["joined"] = (*shape[:-1], shape[-1] * len(members))
        stored[names[len(stored)]] = (kind, members, full[kind])
    place = {
        key: (leaf, kind, k)
        for leaf, (kind, members, _) in stored.items()
        for k, key in enumerate(members)
    }
    return stored, place
