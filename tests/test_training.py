"""What training does: losses fall, both halves move, a frozen half stays; and what it shows."""

import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import STAGES, Train
from linen_nnx import RuleBook, RuleError, Stage
from linen_nnx.book.tree import flatten

from configs.build import ConfigError
from model import create, mlp
from training import assemble, compose, losses
from training.assemble import load_rules
from training.evaluation import report
from training.runtime import checkpoints
from training.runtime.errors import Refused

HALVES = ("encoder", "head")


def rows(run_dir: Path, split: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def params(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    saved = checkpoints.find(run_dir / "checkpoints" / str(step))
    with ocp.StandardCheckpointer() as reader:
        return flatten({"params": reader.restore(saved.path / "state")["params"]})


def test_any_part_may_be_the_first_that_is_ported(train: Train, tmp_path: Path) -> None:
    whole = train("diabetes", "stage=linen", "steps=12")
    first = train("diabetes", "stage=nnx_in_linen", "ported=[head]", "steps=12", "stop_at=6")
    last = train("diabetes", "stage=linen_in_nnx", "ported=[encoder]", "steps=12",
                 f"init_from={first}")  # fmt: skip
    assert (last / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    state = checkpoints.latest(first / "checkpoints").run
    assert state["forms"] == {"encoder": "linen", "head": "nnx"}


def test_a_part_to_port_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        compose("experiment=diabetes", "ported=[encoder,tail]")
    assert error.value.problems == {"ported": "got 'tail'; the model's parts: encoder, head"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("experiment", ["lm", "digits", "diabetes"])
def test_the_loss_decreases_over_training(train: Train, experiment: str) -> None:
    settings = ("steps=150", "optimizer.lr=5e-3") if experiment == "diabetes" else ()
    run_dir = train(experiment, *settings, "eval.every=50")
    losses = [row["loss"] for row in rows(run_dir, "train")]
    evals = [row["loss"] for row in rows(run_dir, "eval")]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    assert evals[-1] < evals[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stage_name", STAGES)
@pytest.mark.parametrize(("features", "hidden", "outputs"), [(3, 4, 1), (10, 16, 2), (1, 7, 3)])
def test_one_small_sgd_step_lowers_the_loss_whatever_the_seed(
    stage_name: str, features: int, hidden: int, outputs: int
) -> None:
    """Of the hybrid and its siblings: 50 seeds for each of 12 programs, dropout on."""
    family = create({
        "family": "mlp", "features": features, "hidden": hidden, "outputs": outputs,
        "dropout": 0.2, "dtype": "float32",
    })  # fmt: skip
    example = {"inputs": jnp.zeros((8, features)), "targets": jnp.zeros((8, outputs))}
    stage = family.ladder(example, load_rules(family)).at(stage_name)

    def losses_of(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), 4)
        params = stage.init(keys[0], example["inputs"])["params"]
        batch = {
            "inputs": jax.random.normal(keys[1], (8, features)),
            "targets": jax.random.normal(keys[2], (8, outputs)),
        }
        rngs = {"dropout": keys[3]}

        def loss(params: Any) -> Any:
            model = losses.Model(stage, {"params": params}, rngs, train=True)
            return family.module.loss(model, batch, rngs)["loss"].mean()

        before, grads = jax.value_and_grad(loss)(params)
        after = loss(jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads))
        norms = {half: optax.tree.norm(grads[half]) for half in HALVES}
        return before, after, norms

    before, after, norms = jax.jit(jax.vmap(losses_of))(jnp.arange(50))
    assert (np.asarray(after) < np.asarray(before)).all()
    for half in HALVES:
        assert (np.asarray(norms[half]) > 0).all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage_name", ["nnx_in_linen", "linen", "linen_in_nnx", "nnx"])
def test_every_parameter_of_both_halves_moves(train: Train, stage_name: str) -> None:
    run_dir = train("digits", f"stage={stage_name}", "stop_at=4", "checkpoint.every=1",
                    "checkpoint.keep=9")  # fmt: skip
    before, after = params(run_dir, 1), params(run_dir, 4)
    assert before.keys() == after.keys()
    still = [path for path in before if (before[path] == after[path]).all()]
    assert still == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("frozen", HALVES)
def test_a_frozen_half_stays_exactly_as_it_was(train: Train, frozen: str, rule: str) -> None:
    run_dir = train("diabetes", "steps=4", f"optimizer.parts.{frozen}.freeze=true",
                    "checkpoint.every=1", "checkpoint.keep=9", "optimizer.warmup=0",
                    f"optimizer={rule}",
                    "optimizer.weight_decay=0.1", "optimizer.ema=0.9",
                    "optimizer.accumulate=2")  # fmt: skip
    before, after = params(run_dir, 1), params(run_dir, 4)
    for path, leaf in before.items():
        same = leaf.tobytes() == after[path].tobytes()
        assert same == (path.split("/")[1] == frozen), path


def test_a_half_learns_at_its_own_rate(train: Train) -> None:
    options = ("steps=1", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.warmup=0",
               "optimizer.clip_norm=null", "optimizer.schedule=constant")  # fmt: skip
    start = params(train("diabetes", *options, "optimizer.lr=1e-30"), 1)
    even = params(train("diabetes", *options), 1)
    slow = params(train("diabetes", *options, "optimizer.parts.encoder.lr_factor=0.5"), 1)
    for path, leaf in start.items():
        factor = 0.5 if path.startswith("params/encoder") else 1.0
        np.testing.assert_allclose(
            slow[path] - leaf, factor * (even[path] - leaf), rtol=1e-3, atol=1e-7
        )


def test_accumulation_averages_the_gradients_of_its_batches(train: Train) -> None:
    """Two batches at the same parameters, then one update."""
    options = ("steps=4", "optimizer.accumulate=2", "optimizer.warmup=0", "checkpoint.every=1",
               "checkpoint.keep=9")  # fmt: skip
    run_dir = train("diabetes", *options)
    states = {step: params(run_dir, step) for step in (1, 2, 3, 4)}
    assert all((states[2][path] == states[3][path]).all() for path in states[1])
    assert any((states[1][path] != states[2][path]).any() for path in states[1])
    assert any((states[3][path] != states[4][path]).any() for path in states[1])


def test_the_schedule_is_as_long_as_the_run(train: Train) -> None:
    run_dir = train("diabetes", "steps=20", "optimizer.warmup=4", "optimizer.lr=1",
                    "optimizer.end_lr_factor=0.25", "optimizer.schedule=linear")  # fmt: skip
    rates = [row["lr"] for row in rows(run_dir, "train")]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(1 - 0.75 * 15 / 16, rel=1e-6)


def test_clipping_and_logging_know_the_norm_of_the_whole_gradient(train: Train) -> None:
    """With SGD at rate 1 the update is the clipped gradient itself."""
    options = ("steps=1", "optimizer=sgd", "optimizer.lr=1", "optimizer.warmup=0",
               "optimizer.clip_norm=0.01", "optimizer.schedule=constant")  # fmt: skip
    start = params(train("diabetes", *options, "optimizer.lr=1e-30"), 1)
    run_dir = train("diabetes", *options)
    moved = params(run_dir, 1)
    step = np.sqrt(sum(np.square(moved[path] - leaf).sum() for path, leaf in start.items()))
    (row,) = rows(run_dir, "train")
    assert np.hypot(row["grad_norm_encoder"], row["grad_norm_head"]) > 0.01
    assert step == pytest.approx(0.01, rel=1e-3)


def test_evaluation_uses_the_averaged_parameters(train: Train) -> None:
    plain = rows(train("diabetes", "steps=30", "eval.every=30"), "eval")
    averaged = rows(train("diabetes", "steps=30", "eval.every=30", "optimizer.ema=0.99"), "eval")
    assert plain[0]["loss"] != averaged[0]["loss"]


def test_overfitting_one_batch_learns_it_by_heart(train: Train) -> None:
    run_dir = train("diabetes", "debug=overfit", "steps=300", "optimizer.lr=1e-2",
                    "model.dropout=0.0", "data.batch=8")  # fmt: skip
    losses = [row["loss"] for row in rows(run_dir, "train")]
    assert losses[-1] < 1e-2 * losses[0]


def test_one_step_goes_the_whole_path_once(train: Train, tmp_path: Path) -> None:
    run_dir = train("diabetes", "debug=one_step", f"run_dir={tmp_path / 'one'}")
    assert [row["step"] for row in rows(run_dir, "train")] == [1]
    assert [row["step"] for row in rows(run_dir, "eval")] == [1]
    assert (run_dir / "checkpoints" / "1" / "state").is_dir()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["one_step", "overfit", "nans", "profile"])
def test_a_debug_run_that_has_ended_begins_anew(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    options = (f"debug={mode}", f"run_dir={tmp_path / mode}", "checkpoint.best=true")
    options += () if mode == "one_step" else ("steps=8", "eval.every=2", "checkpoint.every=4")
    run_dir = train("diabetes", *options)
    before, saved = (run_dir / "metrics.jsonl").read_bytes(), params(run_dir, rows_of(run_dir))
    capsys.readouterr()

    train("diabetes", *options)

    shown = capsys.readouterr().out
    assert f"The run in {run_dir} is for debugging and has ended: it begins anew." in shown
    assert "from scratch" in shown
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    again = params(run_dir, rows_of(run_dir))
    assert all(leaf.tobytes() == again[path].tobytes() for path, leaf in saved.items())
    assert len(list(run_dir.glob("plugins/profile/*"))) == (2 if mode == "profile" else 0)


def test_a_debug_run_begins_anew_at_its_end_alone(train: Train, tmp_path: Path) -> None:
    options = ("debug=nans", f"run_dir={tmp_path / 'run'}", "steps=8")
    run_dir = train("diabetes", *options)
    before = (run_dir / "metrics.jsonl").read_bytes()

    train("diabetes", *options, "stop_at=4")

    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (run_dir / "checkpoints" / "8").is_dir()


def rows_of(run_dir: Path) -> int:
    return rows(run_dir, "train")[-1]["step"]


def test_a_debug_run_goes_on_where_that_is_demanded(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("debug=one_step", f"run_dir={tmp_path / 'one'}")
    train("diabetes", *options)
    train("diabetes", *options, "resume=must")
    assert "Nothing is left to train" in capsys.readouterr().out


def test_a_profile_is_recorded(train: Train) -> None:
    run_dir = train("diabetes", "debug=profile", "steps=20")
    (recorded,) = run_dir.glob("plugins/profile/*/*.xplane.pb")
    assert b"step_num" in recorded.read_bytes()  # by which xprof tells one step from the next


def test_a_profile_ends_with_a_run_that_is_shorter(train: Train, tmp_path: Path) -> None:
    run_dir = train("diabetes", "debug=profile", "steps=8")
    assert list(run_dir.glob("plugins/profile/*/*.xplane.pb"))
    with pytest.raises(Refused, match="would go from step 0 to 5"):
        train("diabetes", "debug=profile", "steps=5", f"run_dir={tmp_path / 'short'}")
    assert not (tmp_path / "short").exists()


def test_a_family_without_a_rule_book_is_told_how_to_find_one(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "rules", lambda options: "missing.yaml", raising=False)
    with pytest.raises(Refused, match=r"There is no rule book .*missing.yaml"):
        train("diabetes", "steps=2")


def test_twins_that_differ_are_refused_before_anything_is_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flax import nnx

    from model.mlp import nnx as port

    class Encoder(port.Encoder):
        def __init__(self, cfg: Any, *, rngs: nnx.Rngs) -> None:
            super().__init__(cfg, rngs=rngs)
            self.linear = nnx.Linear(cfg.features, cfg.hidden, param_dtype="bfloat16", rngs=rngs)

    monkeypatch.setattr(port, "Encoder", Encoder)
    with pytest.raises(RuleError, match=r"encoder/linear/kernel.*float32.*bfloat16"):
        train("diabetes", "steps=2", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("returned", ["(batch, 1)", "bfloat16", "no loss", "lr"])
def test_losses_that_are_no_number_an_example_are_refused_before_anything_is_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str
) -> None:
    real = mlp.loss

    def loss(model: Any, batch: Any, rngs: Any) -> dict[str, Any]:
        loss = real(model, batch, rngs)["loss"]
        return {
            "(batch, 1)": {"loss": loss, "error": loss[:, None]},
            "bfloat16": {"loss": loss.astype("bfloat16")},
            "no loss": {"error": loss},
            "lr": {"loss": loss, "lr": loss},
        }[returned]

    message = {
        "(batch, 1)": r"error: got float32\[16, 1\], expected float32\[16\]",
        "bfloat16": r"loss: got bfloat16\[16\], expected float32\[16\]",
        "no loss": "loss: missing",
        "lr": "lr: the run itself has a metric of that name",
    }[returned]
    monkeypatch.setattr(mlp, "loss", loss)
    with pytest.raises(Refused, match=message):
        train("diabetes", "steps=2", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["step", "opt_state", "ema"])
def test_a_collection_named_as_the_runs_own_state_is_refused(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    import flax.linen as nn
    from flax import nnx
    from flax.nnx.variablelib import VariableTypeCache

    from model.mlp import linen as in_linen
    from model.mlp import nnx as in_nnx

    class Head(in_linen.Head):
        @nn.compact
        def __call__(self, x: Any, shared: Any, **options: Any) -> Any:
            self.variable(name, "count", jnp.zeros, ())
            return super().__call__(x, shared, **options)

    kind = type(name, (nnx.Variable,), {})
    monkeypatch.setitem(VariableTypeCache, name, kind)

    class Port(in_nnx.Head):
        def __init__(self, cfg: Any, *, rngs: nnx.Rngs) -> None:
            super().__init__(cfg, rngs=rngs)
            self.count = kind(jnp.zeros(()))

    book = load_rules(create(compose("experiment=diabetes").model)).to_dict()
    book["rules"].append({"linen": f"{name}/head/count", "nnx": "head/count"})
    monkeypatch.setattr(assemble, "load_rules", lambda family: RuleBook.from_dict(book))
    monkeypatch.setattr(in_linen, "Head", Head)
    monkeypatch.setattr(in_nnx, "Head", Port)
    with pytest.raises(Refused, match=rf"has collections named {name}, under which a checkpoint"):
        train("diabetes", "steps=2", f"stage={stage}", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_learning_rate_that_is_not_the_optimizers_own_is_said(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train("diabetes", "steps=1")
    assert "optimizer: adamw, lr 0.001\n" in capsys.readouterr().out
    train("diabetes", "steps=1", "optimizer=lion", "optimizer.lr=2e-3")
    said = "optimizer: lion, lr 0.002, 10 times the 0.0002 of optimizer=lion\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("warmup", "accumulate", "said"), [(3, 1, 0), (4, 1, 1), (3, 2, 1)])
def test_a_warm_up_longer_than_the_run_is_said(
    train: Train, capsys: pytest.CaptureFixture[str], warmup: int, accumulate: int, said: int
) -> None:
    train("diabetes", "steps=4", f"optimizer.warmup={warmup}", f"optimizer.accumulate={accumulate}")
    text = f"optimizer.warmup is {warmup} updates, and the run has {4 // accumulate}: the learning"
    assert capsys.readouterr().out.count(text) == said


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [(), ("mesh.data=2",), ("debug=nans",)], ids=str)
def test_the_step_is_compiled_once_however_a_run_begins(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]
) -> None:
    first = ("steps=4", "stop_at=2", f"run_dir={tmp_path / 'run'}", *options)
    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        train("diabetes", *first)
        train("diabetes", *first, "stop_at=3")
        train("diabetes", "steps=4", "stage=linen", f"init_from={tmp_path / 'run'}", *options)
    finally:
        jax.config.update("jax_log_compiles", False)

    compiled = [text for text in caplog.messages if "XLA compilation of jit(train)" in text]
    assert len(compiled) == 3


def test_debug_nans_names_the_operation(train: Train) -> None:
    with pytest.raises(FloatingPointError, match=r"invalid value \((nan|inf)\) encountered in \w+"):
        train("diabetes", "debug=nans", "steps=300", "optimizer=sgd", "optimizer.lr=1e12",
              "optimizer.clip_norm=null", "optimizer.warmup=0")  # fmt: skip


def test_tensorboard_reads_what_a_run_writes(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("log.tensorboard=true", "eval.every=10", "log_every=2", "log.histograms_every=10",
               "log.samples=9")  # fmt: skip
    run_dir = train("digits", *options, "stop_at=10")
    train("digits", *options, "stop_at=20", f"run_dir={run_dir}")

    events = EventAccumulator(str(run_dir)).Reload()
    tags = events.Tags()
    for name in ("train/loss", "train/lr", "train/grad_norm_encoder", "train/grad_norm_head",
                 "train/examples_per_second", "eval/loss", "eval/accuracy"):  # fmt: skip
        assert name in tags["scalars"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 21, 2))
    written = [row["loss"] for row in rows(run_dir, "train")]
    assert [event.value for event in events.Scalars("train/loss")] == written
    assert "params/encoder/stem/kernel" in tags["histograms"]
    assert "misclassified" in tags["images"]
    assert "config/text_summary" in tags["tensors"]


def test_misclassified_digits_are_shown_with_their_class_and_the_guess(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageDraw
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn: list[str] = []
    real = ImageDraw.ImageDraw.text

    def text(draw: Any, place: Any, words: str, *args: Any, **options: Any) -> None:
        drawn.append(words)
        real(draw, place, words, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    run_dir = train("digits", "log.tensorboard=true", "stop_at=2", "eval.every=2", "log.samples=7")

    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    assert len(pairs) == 7
    for is_, is_not in pairs:
        assert is_.removeprefix("is ") in "0123456789"
        assert is_not.removeprefix("not ") in "0123456789".replace(is_[-1], "")
    (shown,) = EventAccumulator(str(run_dir)).Reload().Images("misclassified")
    assert (shown.width, shown.height) == (3 * 86, 3 * 104)


def test_tensorboard_lists_first_the_settings_in_which_runs_differ(
    train: Train, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    for seed in (0, 1):
        train("diabetes", "log.tensorboard=true", "steps=2", f"seed={seed}",
              f"optimizer.lr={1 + seed}e-3", f"run_dir={tmp_path / f'run{seed}'}")  # fmt: skip

    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(events, str(tmp_path))
    tab, request = Context(TBContext(data_provider=provider)), RequestContext()
    found = tab.experiment_from_metadata(request, "", True, tab.hparams_metadata(request, ""), [])
    assert [info.name for info in found.hparam_infos][:2] == ["optimizer.lr", "seed"]
    assert "eval/loss" in {info.name.tag for info in found.metric_infos}


def test_events_of_a_run_killed_before_its_first_save_are_drawn_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.runtime.tensorboard import TensorBoard

    for steps in (5, 3):  # the second begins anew and has come less far yet
        board = TensorBoard(tmp_path, 0, {})
        for step in range(1, steps + 1):
            board.scalars(step, {"train/loss": steps})
        board.close(finished=False)
        time.sleep(1.1)  # event files are named by the second

    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("experiment", ["lm", "digits"])
def test_samples_are_compiled_once_for_a_run(
    train: Train, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, traced = Stage.apply, []

    def apply(stage: Any, *args: Any, **how: Any) -> Any:
        traced.append(how["train"])
        return real(stage, *args, **how)

    monkeypatch.setattr(Stage, "apply", apply)
    train(experiment, "log.samples=30", "stop_at=3", "eval.every=1", "log.tensorboard=true")
    assert len([once for once in traced if not once]) == 2  # evaluation, samples


def test_the_language_model_writes_a_sample(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train("lm", "log.samples=30", "eval.every=150")
    out = capsys.readouterr().out
    assert "sample after the prompt" in out
    assert "baseline bigram" in out
    assert re.search("baseline uniform +5.5452", out)


def test_mode_eval_finds_what_the_run_has_found_and_writes_nothing(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train("diabetes", "steps=6", "eval.every=3", "checkpoint.best=true", "stage=nnx")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()

    report(compose("mode=eval", f"run_dir={run_dir}", "eval.batches=null"))

    shown = capsys.readouterr().out
    assert f"checkpoints, step 6, stage nnx: validation loss {last['loss']:.6f}" in shown
    assert "encoder/linear" in shown
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_the_parameter_table_counts_each_parameter_once(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train("diabetes", "steps=1", "stage=linen")
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert rows["encoder"] == rows["encoder/Dense_0"] == ["704", "2,816", "float32"]
    assert rows["head"] == rows["head/Dense_0"] == ["75", "300", "float32"]


def test_a_resumed_run_says_which_settings_have_changed(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train("diabetes", "steps=4", "stop_at=2", "eval.every=2")
    train("diabetes", "steps=4", "eval.every=4", f"run_dir={run_dir}")
    shown = capsys.readouterr().out
    assert "eval.every: was 2, is 4" in shown
    assert "stop_at: was 2, is None" in shown


def test_debug_profile_leaves_the_compiled_step_as_text(train: Train) -> None:
    run_dir = train("diabetes", "steps=20", "debug=profile")
    assert "HloModule" in (run_dir / "train_step.hlo.txt").read_text()
