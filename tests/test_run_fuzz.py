"""Whatever bytes stand in a run's files: a message that names the file, never a traceback.

A real run is damaged in one file at a time, by bits and by meaning. Half of the damage gets new
digests, so that what reads the files has to find it itself.
"""

import contextlib
import copy
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET, SMALL
from linen_nnx.disk import digests
from linen_nnx.disk.runs import said_in
from linen_nnx.errors import Refusal

from configs.schema import Config
from training import assemble, compose, data, evaluation, loop, moving
from training.plot import curves
from training.runtime import lock, start
from training.runtime.metrics import Metrics
from training.runtime.runs import RUNS
from training.table import results

COUNT = int(os.environ.get("FUZZ_RUNS", "30"))  # more: FUZZ_RUNS=3000
OPTIONS = (*SMALL["diabetes"], *QUIET, "steps=4", "eval.every=1", "checkpoint.every=1",
           "checkpoint.keep=2", "checkpoint.best=true")  # fmt: skip
SLOWEST = 120  # seconds for one reading, on a busy machine; a hang would take for ever

# What a careless or ill-willed writer may put where a run's file was.
TEXTS = (
    b"", b"\x00", b"\xff\xfe", b"null", b"[]", b"{}", b'"', b"1e999", b"-1", b"[" * 100_000,
    b'{"a":' * 100_000, b'{"batches": -1}', b'{"config": 3, "stage": [], "rules": {}}',
    b"a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", b"!!python/object:os.system {}\n", b"9" * 5000,
    b'{"step": 1, "split": "eval"}\n', b'{"step": true, "split": "train", "loss": 1}\n',
    b'{"step": 1, "split": "train", "loss": NaN}\n', b'{"step": 1, "split": ["train"]}\n',
)  # fmt: skip
VALUES = (None, True, -1, 10**400, 1.5, "", "x", [], [1], {}, {"a": {}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("fuzz") / "run"
    loop.train(configured(run_dir, "stop_at=2"))
    return run_dir


def configured(run_dir: Path, *overrides: str) -> Config:
    return compose(*OPTIONS, f"run_dir={run_dir}", *overrides)


def damage(content: bytes, chance: random.Random) -> bytes:
    """Other bytes than these: a bit, a cut, a piece twice, another text, another value."""
    kind = chance.choice(("bit", "cut", "twice", "text", "value", "value"))
    at = chance.randrange(len(content) + 1)
    if kind == "bit" and content:
        flipped = bytearray(content)
        flipped[at % len(content)] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    if kind == "twice":
        return content[:at] + content[at // 2 :]
    if kind == "text":
        return chance.choice(TEXTS)
    if kind == "value":
        with contextlib.suppress(ValueError):
            return json.dumps(with_another_value(json.loads(content), chance)).encode()
        lines = content.split(b"\n")
        line = chance.randrange(len(lines))
        value = json.dumps(chance.choice(VALUES)).encode()
        lines[line] = lines[line].partition(b":")[0] + b": " + value
        return b"\n".join(lines)
    return content[:at]


def with_another_value(tree: Any, chance: random.Random) -> Any:
    """The same JSON, but for one value, at any depth, or one key, which is gone."""
    if not isinstance(tree, (dict, list)) or not tree or chance.random() < 0.2:
        return chance.choice(VALUES)
    key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    copy = tree.copy()
    if chance.random() < 0.2:
        del copy[key]
    else:
        copy[key] = with_another_value(tree[key], chance)
    return copy


@contextlib.contextmanager
def damaged(run_dir: Path, path: Path, content: bytes, *, sealed: bool) -> Iterator[None]:
    """Within the block the file has this content; sealed: its checkpoint's digests say so, too."""
    kept = {path: path.read_bytes()}
    steps = [parent for parent in path.parents if (parent / digests.NAME).exists()]
    kept |= {step / digests.NAME: (step / digests.NAME).read_bytes() for step in steps}
    path.write_bytes(content)
    if sealed and path.name != digests.NAME:
        for step in steps:
            digests.write(step)
    try:
        yield
    finally:
        for file, before in kept.items():
            file.write_bytes(before)


@pytest.fixture
def readers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Callable[[Path], object]]:
    """Everything that reads a run directory, without what compiles and computes."""
    built: dict[str, Any] = {}

    def prepare(cfg: Config) -> Any:
        key = repr((cfg.model, cfg.data, cfg.optimizer, cfg.stage, cfg.seed, cfg.steps))
        if key not in built:
            built[key] = assemble.prepare(cfg)
        setup = copy.copy(built[key])
        setup.cfg = cfg
        vars(setup).pop("run", None)  # which is the other configuration's
        return setup

    monkeypatch.setattr(evaluation, "prepare", prepare)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: {"loss": 0.0})

    def begin(cfg: Config) -> None:
        setup = prepare(cfg)
        batches = data.train_iterator(setup.dataset)
        with contextlib.closing(batches), lock.held(Path(cfg.run_dir)):
            saved = start.find(setup.run)
            start.begin(setup.run, setup.program, saved, lambda other: moving.moved(setup, other))
            if saved is not None:
                moving.set_position(batches, saved)
            Metrics(Path(cfg.run_dir), saved.step if saved else 0, write=False)

    return {
        "resume": lambda run: begin(configured(run)),
        "without verifying": lambda run: begin(configured(run, "checkpoint.verify=false")),
        "init_from": lambda run: begin(configured(tmp_path / "new", f"init_from={run}")),
        "mode=eval": lambda run: evaluation.report(configured(run, "mode=eval")),
        "table": lambda run: (results([run]), curves([run], "loss")),
    }


@pytest.mark.long
def test_any_damage_to_a_run_is_a_refusal_that_names_the_file_or_none(
    trained: Path, tmp_path: Path, readers: dict[str, Callable[[Path], object]]
) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    files = sorted(path for path in run_dir.rglob("*") if path.is_file())
    small = [path for path in files if path.suffix in (".yaml", ".jsonl") or path.parent.name in
             ("run", "data") or path.name in (digests.NAME, "_METADATA", "_sharding")]  # fmt: skip
    refused = 0
    for number in range(COUNT):
        chance = random.Random(number)
        path = chance.choice(small if number % 3 else files)
        content = damage(path.read_bytes(), chance)
        where = f"number {number}: {path.relative_to(run_dir)} of {content[:60]!r}"
        with damaged(run_dir, path, content, sealed=chance.random() < 0.5):
            for name in chance.sample(sorted(readers), 2):
                begun = time.monotonic()
                message = refusal(readers[name], run_dir, f"{name}, {where}")
                assert time.monotonic() - begun < SLOWEST, f"{name}, {where}"
                if message is not None:
                    refused += 1
                    assert str(run_dir) in message, f"{name}, {where}: {message}"
    assert refused > COUNT // 4


def refusal(reader: Callable[[Path], object], run_dir: Path, where: str) -> str | None:
    """What it says of the damaged run; None where it has read it."""
    try:
        reader(run_dir)
    except Refusal as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(where) from error
    return None


def test_whatever_an_item_says_of_its_run_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    known = {"stage": "linen", "rules": {}, "forms": {"a": "nnx"}, "ported": ["a"], "config": {}}
    for left_out, key in itertools.product((None, *known), known):
        for value in VALUES:
            content = {**known, key: value}
            content.pop(left_out, None)
            (tmp_path / "run" / "metadata").write_text(json.dumps(content))
            with contextlib.suppress(Refusal):
                if (said := said_in(tmp_path, RUNS)) is not None:
                    said.at("nnx_in_linen")
                    RUNS.moved(said.content, "nnx")
