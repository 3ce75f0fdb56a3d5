"""Something to look at beside numbers: text that the model writes, digits that it gets wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from configs.schema import Config
from model.stages import Stage, Variables
from training import data
from training.board import Board
from training.state import Program, State

SCALE = 8  # screen pixels per pixel of a digit


def show(cfg: Config, program: Program, dataset: data.Dataset, state: State, board: Board) -> str:
    """Shows samples of the model in TensorBoard, if the data has a kind that can be shown.

    Returns:
        What a terminal can show of them; empty where there is nothing.
    """
    if not cfg.log.samples:
        return ""
    step = int(state.step)
    if cfg.data.name == "text":
        prompt, text = write_text(cfg, program, dataset, state)
        board.text(step, "sample", f"{prompt}|{text}")
        return f"sample after the prompt {prompt[-40:]!r}:\n{text}"
    if cfg.data.name == "digits":
        image, wrong = misclassified(cfg, program, dataset, state)
        if wrong:
            board.image(step, "misclassified", image)
        where = ": see TensorBoard" if wrong and cfg.log.tensorboard else ""
        return f"{wrong} misclassified validation digits{where}"
    return ""


def write_text(
    cfg: Config, program: Program, dataset: data.Dataset, state: State
) -> tuple[str, str]:
    """A prompt, `log.prompt` or validation text, and `log.samples` bytes written after it.

    Sampled at temperature 0.8 with a key that depends on the seed and the step alone.
    """
    prompt = dataset.validation.take(np.array([0]))["inputs"]
    if cfg.log.prompt is not None:  # a window is full: a short prompt has spaces before it
        length = prompt.shape[1]
        given = cfg.log.prompt.encode()[-length:].rjust(length)
        prompt = np.frombuffer(given, np.uint8).astype(prompt.dtype)[None]
    key = jax.random.fold_in(jax.random.key(cfg.seed + 1), int(state.step))
    written = _written(program.stage, cfg.log.samples, program.evaluated(state), prompt, key)
    return _decoded(prompt[0]), _decoded(program.fetch(written))


# Compiled once for a run: the stage is static, its variables are not.
@partial(jax.jit, static_argnums=(0, 1))
def _written(stage: Stage, count: int, variables: Variables, prompt: Array, key: Array) -> Array:
    """(count,) bytes that the model writes after the prompt (1, length)."""

    def extend(window: Array, index: Array) -> tuple[Array, Array]:
        logits, _ = stage.apply(variables, window, train=False)
        byte = jax.random.categorical(jax.random.fold_in(key, index), logits[:, -1] / 0.8)
        byte = byte.astype(window.dtype)
        return jnp.concatenate([window[:, 1:], byte[:, None]], axis=1), byte[0]

    return jax.lax.scan(extend, prompt, jnp.arange(count))[1]


@partial(jax.jit, static_argnums=0)
def _guesses(stage: Stage, variables: Variables, inputs: Array) -> Array:
    """(batch,) classes with the highest score."""
    return stage.apply(variables, inputs, train=False)[0].argmax(-1)


def misclassified(
    cfg: Config, program: Program, dataset: data.Dataset, state: State
) -> tuple[np.ndarray, int]:
    """A grid of up to `log.samples` validation digits that the model gets wrong.

    Returns:
        The grid, (height, width, 3) uint8, each digit with a bar of its predicted class in red
        beneath it; and how many there are in all.
    """
    tiles, wrong = [], 0
    variables = program.evaluated(state)
    for batch in data.eval_batches(dataset, cfg.data, cfg.eval.batches):
        guesses = program.fetch(_guesses(program.stage, variables, batch["inputs"]))
        for index in np.flatnonzero((guesses != batch["targets"]) & (batch["weight"] > 0)):
            wrong += 1
            if len(tiles) < cfg.log.samples:
                tiles.append(_tile(batch["inputs"][index, ..., 0], int(guesses[index])))
    columns = int(np.ceil(np.sqrt(max(1, len(tiles)))))
    blank = np.zeros_like(tiles[0]) if tiles else np.zeros((1, 1, 3), np.uint8)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows, 0) if rows else blank, wrong


def _tile(image: np.ndarray, guess: int) -> np.ndarray:
    """(height, width) float32 in [0, 1] enlarged, with a red bar as long as the guessed class."""
    gray = np.kron(image, np.ones((SCALE, SCALE), np.float32))
    tile = np.repeat((gray * 255).astype(np.uint8)[..., None], 3, axis=2)
    bar = np.zeros((SCALE, tile.shape[1], 3), np.uint8)
    bar[2:-2, : guess * tile.shape[1] // 10, 0] = 255
    return np.concatenate([tile, bar, np.zeros_like(bar)], axis=0)


def _decoded(values: np.ndarray) -> str:
    return bytes(values.astype(np.uint8)).decode("utf-8", errors="replace")
