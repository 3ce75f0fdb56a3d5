"""Something to look at beside numbers: text that the model writes, digits that it gets wrong."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from linen_nnx import Stage

from training import data
from training.assemble import Setup
from training.runtime.board import Board
from training.runtime.program import State

SCALE, GAP, CAPTION = 10, 6, 24  # pixels: of a digit's, between digits, beneath one


def show(setup: Setup, state: State, board: Board) -> str:
    """Shows samples of the model in TensorBoard: the family's own, or what the data's kind allows.

    Returns:
        What a terminal can show of them; empty where there is nothing.
    """
    cfg = setup.cfg
    if not cfg.log.samples:
        return ""
    own = getattr(setup.family.module, "show", None)
    if own is not None:
        return own(setup, state, board)
    step = int(state["step"])
    if cfg.data["name"] == "text":
        prompt, text = write_text(setup, state)
        board.text(step, "sample", f"{prompt}|{text}")
        return f"sample after the prompt {prompt[-40:]!r}:\n{text}"
    if cfg.data["name"] == "digits":
        image, wrong = misclassified(setup, state)
        if image is not None:
            board.image(step, "misclassified", image)
        # `mode=eval` writes to none.
        is_shown = wrong and cfg.log.tensorboard and board.has_loggers
        where = ": see TensorBoard" if is_shown else ""
        return f"{wrong} misclassified validation digits{where}"
    return ""


def write_text(setup: Setup, state: State) -> tuple[str, str]:
    """A prompt, `log.prompt` or validation text, and `log.samples` bytes written after it.

    Sampled at temperature 0.8 with a key that depends on the seed and the step alone.
    """
    cfg = setup.cfg
    prompt = setup.dataset.validation.take(np.array([0]))["inputs"]
    if cfg.log.prompt is not None:  # a window is full: a short prompt has spaces before it
        length = prompt.shape[1]
        given = cfg.log.prompt.encode()[-length:].rjust(length)
        prompt = np.frombuffer(given, np.uint8).astype(prompt.dtype)[None]
    # Another seed than that of training, so that looking at samples is no part of what is trained.
    key = jax.random.fold_in(jax.random.key(cfg.seed + 1), int(state["step"]))
    written = _written(setup.stage, cfg.log.samples, _variables(setup, state), prompt, key)
    return _decoded(prompt[0]), _decoded(setup.program.fetch(written))


def _variables(setup: Setup, state: State) -> State:
    """The variables that evaluation uses."""
    return {**setup.collections(state), "params": setup.steps.evaluated(state)}


# Compiled once for a run: the stage is static, its variables are not.
@partial(jax.jit, static_argnums=(0, 1))
def _written(stage: Stage, count: int, variables: State, prompt: Array, key: Array) -> Array:
    """(count,) bytes that the model writes after the prompt (1, length)."""

    def extend(window: Array, index: Array) -> tuple[Array, Array]:
        logits = stage.apply(variables, window, train=False)
        byte = jax.random.categorical(jax.random.fold_in(key, index), logits[:, -1] / 0.8)
        byte = byte.astype(window.dtype)
        return jnp.concatenate([window[:, 1:], byte[:, None]], axis=1), byte[0]

    return jax.lax.scan(extend, prompt, jnp.arange(count))[1]


@partial(jax.jit, static_argnums=0)
def _guesses(stage: Stage, variables: State, inputs: Array) -> Array:
    """(batch,) classes with the highest score."""
    return stage.apply(variables, inputs, train=False).argmax(-1)


def misclassified(setup: Setup, state: State) -> tuple[np.ndarray | None, int]:
    """A sheet of up to `log.samples` validation digits that the model gets wrong.

    Returns:
        The sheet, (height, width, 3) uint8, beneath each digit what it is and what the model took
        it for; None where all are right; and how many are wrong in all.
    """
    from PIL import Image, ImageDraw, ImageFont

    found = []
    cfg, variables = setup.cfg, _variables(setup, state)
    for batch, weight in data.eval_batches(setup.dataset, cfg.eval.batches):
        guesses = setup.program.fetch(_guesses(setup.stage, variables, batch["inputs"]))
        # Rows that only fill up a batch are copies, and would be shown twice.
        for index in np.flatnonzero((guesses != batch["targets"]) & (weight > 0)):
            found.append((batch["inputs"][index, ..., 0], batch["targets"][index], guesses[index]))
    shown = found[: cfg.log.samples]
    if not shown:
        return None, 0
    height, width = (SCALE * size for size in shown[0][0].shape)
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP), rows * (height + CAPTION)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION * 2 / 3)
    for place, (image, truth, guess) in enumerate(shown):
        left, top = place % columns * (width + GAP), place // columns * (height + CAPTION)
        tile = Image.fromarray((image * 255).astype(np.uint8))
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height), f"is {truth}", "white", font)
        draw.text((left + width, top + height), f"not {guess}", "tomato", font, anchor="ra")
    return np.asarray(sheet), len(found)


def _decoded(values: np.ndarray) -> str:
    r"""Bytes as text that may be printed: a model that has learnt little writes escape codes, too,
    which a terminal would obey.

    Example:
      >>> _decoded(np.frombuffer(b"a\x1b[2J", np.uint8)).isprintable()
      True
    """
    text = bytes(values.astype(np.uint8)).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
