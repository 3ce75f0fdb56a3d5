"""Data as people have it: any examples, streams, iterators of one's own; all resume exactly."""

import dataclasses
import json
import re
from itertools import islice
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import yaml
from conftest import QUIET, SMALL, STAGES

from configs.build import ConfigError
from training import compose, data, datasets, loop
from training.datasets import Dataset, Options, Rows
from training.runtime.errors import Refused

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
OPTIONS = Options(name="mine", batch=4, seed=0)


def example(number):
    """A nested example: two inputs of different types, and a tuple."""
    return {
        "image": np.full((2, 2), number, np.float32),
        "words": {"ids": np.arange(3, dtype=np.int32) * number, "length": np.int32(number % 3)},
        "pair": (np.float32(number), np.int32(-number)),
    }


def batches_of(count):
    """Batches of four nested examples."""
    for first in range(0, 4 * count, 4):
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *map(example, range(first, first + 4)))


class Counting:
    """An endless stream of one's own, whose state JSON cannot hold."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return self

    def __next__(self):
        return {"inputs": self.rng.normal(size=(4, 3)), "more": (self.rng.integers(9, size=4),)}

    def get_state(self):
        return {"generator": self.rng.bit_generator, "as": (1, 2)}

    def set_state(self, state):
        self.rng = np.random.Generator(state["generator"])


def stream():
    return grain.MapDataset.range(48).map(example).repeat().to_iter_dataset().batch(4)


KINDS = {
    "list": lambda: [example(number) for number in range(10)],
    "grain map": lambda: grain.MapDataset.range(10).map(example),
    "rows": lambda: Rows({"a": np.arange(10), "b": np.ones((10, 2))}),
    "grain iter": stream,
    "own": Counting,
}


def dataset(kind, validation=(), **options):
    return Dataset(
        dataclasses.replace(OPTIONS, **options), KINDS[kind](), validation, "", digest="mine"
    )


def bits(batches):
    return [[(x.dtype, x.shape, x.tobytes()) for x in jax.tree.leaves(batch)] for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 7])
def test_every_kind_resumes_with_the_next_batch_bit_for_bit(kind, k):
    whole = data.train_iterator(dataset(kind))
    for _ in range(k):
        next(whole)
    position = json.loads(json.dumps(whole.get_state()))

    resumed = data.train_iterator(dataset(kind))
    next(resumed)
    resumed.set_state(position)
    assert bits(islice(resumed, 12)) == bits(islice(whole, 12))
    assert position["batches"] == k


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_by_any_number_of_processes(kind):
    whole = list(islice(data.train_iterator(dataset(kind)), 5))
    parts = [list(islice(data.train_iterator(dataset(kind), p, 2), 5)) for p in range(2)]

    together = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *pair) for pair in zip(*parts, strict=True)
    ]
    assert bits(together) == bits(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_the_first_batch_moves_no_position(kind):
    read = dataset(kind)
    first = data.first_batch(read)
    begun, fresh = (islice(data.train_iterator(one), 3) for one in (read, dataset(kind)))

    assert bits(begun) == bits(fresh)
    assert jax.tree.structure(first) == jax.tree.structure(data.first_batch(dataset(kind)))


@pytest.mark.parametrize("kind", ["list", "grain map"])
def test_examples_of_one_kind_or_another_come_in_the_order_of_rows(kind):
    numbers = [batch["pair"][1] for batch in islice(data.train_iterator(dataset(kind)), 5)]
    rows = [-batch["a"] for batch in islice(data.train_iterator(dataset("rows")), 5)]

    np.testing.assert_array_equal(numbers, rows)


@pytest.mark.parametrize(
    "validation",
    [
        [example(number) for number in range(10)],
        grain.MapDataset.range(10).map(example),
        grain.MapDataset.range(10).map(example).to_iter_dataset().batch(4),
        [example(number) for number in range(3)],
    ],
    ids=["list", "grain map", "grain iter", "less than a batch"],
)
def test_validation_weighs_every_example_once_whatever_its_kind(validation):
    read = dataset("list", validation)
    pairs = list(data.eval_batches(read))

    numbers = np.concatenate([batch["pair"][1][weight == 1] for batch, weight in pairs])
    count = 3 if len(pairs) == 1 else 10
    assert sorted(-numbers) == list(range(count))
    assert {data.rows_of(batch) for batch, _ in pairs} == {4}
    assert bits(data.eval_batches(read)) == bits(pairs)
    assert bits(data.eval_batches(read, 1)) == bits(pairs[:1])


def test_a_short_batch_of_a_stream_is_shared_by_processes_as_well():
    validation = grain.MapDataset.range(10).map(example).to_iter_dataset().batch(4)
    read = dataset("list", validation)
    parts = [list(data.eval_batches(read, None, p, 4)) for p in range(4)]

    weights = [
        np.concatenate(rows) for rows in zip(*[[w for _, w in part] for part in parts], strict=True)
    ]
    assert [weight.tolist() for weight in weights] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]


def test_a_saved_position_does_not_move_when_the_stream_reads_on():
    batches = data.train_iterator(dataset("own"))
    position = batches.get_state()
    before = json.dumps(position)
    next(batches)

    assert json.dumps(position) == before


# --- refusals


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (iter([]), "is a list_iterator, whose iterator has no get_state and set_state"),
        (grain.MapDataset.range(9).repeat(), "repeats for ever, and is to be shuffled anew in"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(train, words):
    with pytest.raises(Refused, match=words):
        data.train_iterator(Dataset(OPTIONS, train, [], "", digest=""))


def test_gaps_in_filtered_data_are_refused():
    gaps = grain.MapDataset.range(9).filter(lambda number: number % 2 == 0).map(example)
    with pytest.raises(
        Refused, match="The data has gaps, as a Grain MapDataset has after `filter`"
    ):
        next(data.train_iterator(Dataset(OPTIONS, gaps, [], "", digest="")))


def test_a_stream_that_ends_before_the_run_is_refused_with_how_far_it_went():
    finite = grain.MapDataset.range(8).map(example).to_iter_dataset().batch(4)
    batches = data.train_iterator(Dataset(OPTIONS, finite, [], "", digest=""))
    for _ in range(2):
        next(batches)
    with pytest.raises(Refused, match="has ended after 2 batches, before the run"):
        next(batches)


def test_rows_of_a_stream_that_processes_cannot_share_are_refused():
    with pytest.raises(Refused, match=r"has 4 rows .*, which 3 processes cannot share evenly"):
        next(data.train_iterator(dataset("own", batch=3), 0, 3))


def test_a_position_of_other_data_is_refused_with_every_difference():
    position = data.train_iterator(dataset("grain iter")).get_state()
    other = data.train_iterator(dataclasses.replace(dataset("grain iter", seed=3), digest="else"))
    with pytest.raises(Refused, match=r"(?s)digest: was 'mine', is 'else'.*seed: was 0, is 3"):
        other.set_state(position)


def test_a_position_of_an_earlier_version_is_read():
    from test_data import load

    now = data.train_iterator(load("digits"))
    position = {**now.get_state(), "length": None, "batches": 7}
    now.set_state(position)
    assert now.get_state()["batches"] == 7


# --- the page


@pytest.fixture
def page_sets(tmp_path, monkeypatch):
    """The data sets of docs/data.md, as modules that the registry finds."""
    blocks = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE.read_text(), re.M | re.S)
    for path, text in blocks:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    folder = str(tmp_path / "training" / "datasets")
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, folder])
    for index in range(3):
        lines = [f"{word} " * (1 + word % 7) for word in range(40 * index, 40 * index + 40)]
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{index}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(folder, name, stage, run_dir, *overrides, **options):
    """Trains on a data set of the page; returns what it measured."""
    experiment = {"ring": "diabetes", "lines": "lm"}[name]
    small = [*SMALL[experiment], *QUIET, "checkpoint.best=false", "eval.batches=null"]
    cfg = compose(*small, f"stage={stage}", f"run_dir={folder / run_dir}", *overrides)
    mapping = yaml.safe_load((folder / "configs" / "data" / f"{name}.yaml").read_text())
    if name == "lines":
        mapping |= {"path": str(folder / "texts"), "length": 32}
    loop.train(dataclasses.replace(cfg, data={**mapping, **options}))
    return (folder / run_dir / "metrics.jsonl").read_bytes()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["ring", "lines"])
def test_a_data_set_of_the_page_draws_one_curve_at_every_stage(page_sets, name):
    steps = ("steps=6", "eval.every=3", "optimizer.warmup=2")
    curves = {run(page_sets, name, stage, stage, *steps) for stage in STAGES}

    assert len(curves) == 1
    assert curves.pop().count(b'"eval"') == 2


@pytest.mark.long
def test_a_run_on_a_stream_resumes_to_the_same_curve(page_sets):
    steps = ("steps=10", "eval.every=5", "optimizer.warmup=2")
    whole = run(page_sets, "lines", "nnx", "whole", *steps)
    run(page_sets, "lines", "nnx", "halves", *steps, "stop_at=5")

    assert run(page_sets, "lines", "nnx", "halves", *steps) == whole


@pytest.mark.long
def test_a_run_on_a_stream_may_be_spread_over_devices(page_sets):
    steps = ("steps=4", "eval.every=2", "optimizer.warmup=2", "checkpoint.every=100")
    spread = run(page_sets, "lines", "nnx", "spread", *steps, "mesh.data=2")
    alone = run(page_sets, "lines", "nnx", "alone", *steps)

    losses = [[json.loads(row)["loss"] for row in rows.splitlines()] for rows in (spread, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_options_of_a_data_set_are_checked_by_its_own_class(page_sets):
    with pytest.raises(ConfigError) as error:
        datasets.create({"name": "ring", "batch": 0, "sed": 0, "points": 1.5})

    assert error.value.problems == {
        "data.batch": "got 0; expected a whole number, at least 1",
        "data.sed": "unknown key; did you mean 'data.seed'?",
        "data.points": "got 1.5; expected a whole number, at least 1",
        "data.seed": "missing; expected a whole number, at least 0",
    }


def test_a_proof_needs_no_files_where_the_data_set_says_so():
    text = {"name": "text", "path": "/nowhere", "length": 16, "batch": 3, "val_fraction": 0.1,
            "seed": 0}  # fmt: skip

    assert data.example(text, rows=8)["inputs"].shape == (3, 16)
