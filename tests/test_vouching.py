"""A checkpoint vouches for the files beside it: what is lost, changed or added is named."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from conftest import QUIET, SMALL
from linen_nnx.cli import main
from linen_nnx.disk import digests

from configs.schema import Config
from training import compose, debug, loop
from training.assemble import prepare
from training.evaluation import report
from training.runtime import lock, numerics, start
from training.runtime.checkpoints import Saved
from training.runtime.errors import Refused

OPTIONS = (*SMALL["diabetes"], *QUIET, "steps=9", "eval.every=3", "checkpoint.every=3",
           "checkpoint.keep=9", "checkpoint.best=false")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped at step 6, with checkpoints 3 and 6: rows of steps 1 to 3, the
    evaluation of step 3, and the same up to step 6."""
    run_dir = tmp_path_factory.mktemp("vouched") / "run"
    loop.train(configured(run_dir, "stop_at=6"))
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def configured(run_dir: Path, *overrides: str) -> Config:
    return compose(*OPTIONS, f"run_dir={run_dir}", *overrides)


def found(run_dir: Path, *overrides: str) -> Saved | None:
    """What a resume goes on from: all of it that reads, without the compiling and the training."""
    cfg = configured(run_dir, *overrides)
    with lock.held(run_dir):
        return start.find(prepare(cfg).run)


def refusal(run_dir: Path, *overrides: str) -> str:
    before = contents(run_dir)
    with pytest.raises(Refused) as error:
        found(run_dir, *overrides)
    assert contents(run_dir) == before
    return str(error.value)


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


# Row 4 is the evaluation of step 3.
DAMAGE = {
    "missing": (lambda rows: rows[:4] + rows[5:], "row 5 (step 4) is missing"),
    "missing at the end": (lambda rows: rows[:-1], "row 8 (step 6) is missing"),
    "two missing": (lambda rows: rows[:1] + rows[3:], "rows 2 to 3 (steps 2 to 3) are missing"),
    "changed": (
        lambda rows: [*rows[:2], rows[2].replace(b"1", b"2", 1), *rows[3:]],
        "row 3 (step 3) was changed",
    ),
    "twice": (lambda rows: [*rows[:2], *rows[1:]], "(step 2) of the file is extra"),
    "no JSON": (lambda rows: [rows[0], b"\xff\n", *rows[2:]], "row 2 (step 2) was changed"),
    "torn": (lambda rows: [*rows[:-1], rows[-1][:9]], "row 8 (step 6) is missing"),
    "empty": (lambda rows: [], "rows 1 to 8 (steps 1 to 6) are missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_the_metrics_is_refused_by_row_and_step(run_dir: Path, kind: str) -> None:
    change, words = DAMAGE[kind]
    edit(run_dir / "metrics.jsonl", change)
    message = refusal(run_dir)
    assert f"{run_dir} is not as its checkpoint of step 6 says:\n  metrics.jsonl: " in message
    assert words in message


def test_metrics_that_are_missing_are_refused(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    assert "metrics.jsonl: is missing; it had 8 rows up to step 6" in refusal(run_dir)


def test_rows_after_the_checkpoint_are_no_damage(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "6")
    saved = found(run_dir)
    assert saved is not None and saved.step == 3


def test_each_remedy_for_damaged_metrics_works(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (run_dir / "metrics.jsonl").read_bytes()
    edit(run_dir / "metrics.jsonl", DAMAGE["missing"][0])
    message = refusal(run_dir)

    assert f"init_from={run_dir} and another run_dir" in message
    taken = found(tmp_path / "other", f"init_from={run_dir}")
    assert taken is not None and taken.step == 6

    assert "checkpoint.verify=false" in message
    found(run_dir, "checkpoint.verify=false")
    assert "metrics.jsonl are taken as they are" in capsys.readouterr().out

    assert "Put metrics.jsonl back" in message
    (run_dir / "metrics.jsonl").write_bytes(whole)
    found(run_dir)


def test_a_row_that_cannot_be_read_is_named_also_where_nothing_is_compared(run_dir: Path) -> None:
    file, settings = run_dir / "metrics.jsonl", ("checkpoint.verify=false", "stop_at=7")
    edit(file, DAMAGE["no JSON"][0])
    with pytest.raises(Refused, match=r"metrics.jsonl cannot be read: row 2: .*take that line out"):
        loop.train(configured(run_dir, *settings))

    edit(file, lambda rows: [row for row in rows if row != b"\xff\n"])
    loop.train(configured(run_dir, *settings))
    assert [json.loads(row)["step"] for row in file.read_bytes().splitlines()][:3] == [1, 3, 3]
    found(run_dir)  # the checkpoint of step 7 vouches for the rows as they were taken


def test_a_changed_configuration_is_found_by_key_and_written_anew_once_removed(
    run_dir: Path,
) -> None:
    file = run_dir / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 4", 1))
    message = refusal(run_dir)
    assert re.search(r"config.yaml: \w*\.?seed is 4, and was 0", message)
    assert "Remove config.yaml" in message

    file.unlink()
    loop.train(configured(run_dir, "stop_at=6"))
    assert "seed: 0" in file.read_text() and "seed: 4" not in file.read_text()


def test_a_changed_rule_book_is_found_and_written_anew_once_removed(run_dir: Path) -> None:
    file = run_dir / "rules.yaml"
    text = file.read_text()
    file.write_text(text.replace("Dense_0", "Dense_1", 1))
    message = refusal(run_dir)
    assert "rules.yaml: is another rule book than the checkpoint's" in message
    assert "Remove rules.yaml" in message

    file.unlink()
    loop.train(configured(run_dir, "stop_at=6"))
    assert file.read_text() == text


def test_evaluation_compares_as_a_resume_does(run_dir: Path) -> None:
    edit(run_dir / "metrics.jsonl", DAMAGE["changed"][0])
    with pytest.raises(Refused, match=r"row 3 \(step 3\) was changed"):
        report(compose("mode=eval", f"run_dir={run_dir}"))


def test_a_run_of_before_goes_on_and_says_that_nothing_vouches_for_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = run_dir / "checkpoints" / "6"
    run = json.loads((step / "run" / "metadata").read_text())
    old = {name: run[name] for name in ("config", "stage", "rules")}
    (step / "run" / "metadata").write_text(json.dumps(old))
    digests.write(step)
    edit(run_dir / "config.yaml", lambda rows: rows[: rows.index(b"numerics:\n")])
    edit(run_dir / "metrics.jsonl", DAMAGE["missing"][0])

    found(run_dir)

    said = capsys.readouterr().out
    assert said.count("vouches for no metrics.jsonl") == 1
    assert said.count("does not say under which settings of JAX it began") == 1


def test_a_renamed_checkpoint_is_refused(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "6").rename(run_dir / "checkpoints" / "5")
    edit(run_dir / "metrics.jsonl", lambda rows: rows[:-2])
    assert "is not as its checkpoint of step 5 says" in refusal(run_dir)
    with pytest.raises(Refused, match=r"holds the state after step 6.*Call it 6 again"):
        loop.train(configured(run_dir, "checkpoint.verify=false"))


# The settings of JAX that move every bit


@pytest.fixture
def otherwise() -> Iterator[None]:
    """Another precision than that of the run."""
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", None)


def test_a_resume_under_another_setting_of_jax_is_refused(run_dir: Path, otherwise: None) -> None:
    message = refusal(run_dir)
    assert f"{run_dir} belongs to another run:" in message
    assert "JAX_DEFAULT_MATMUL_PRECISION: was None, is highest" in message
    assert "(in the environment: JAX_DEFAULT_MATMUL_PRECISION left out)" in message


def test_a_run_without_a_checkpoint_compares_its_configuration_file(
    run_dir: Path, otherwise: None
) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    assert "JAX_DEFAULT_MATMUL_PRECISION: was None, is highest" in refusal(run_dir)


def test_init_from_a_run_under_another_setting_says_so(
    run_dir: Path, tmp_path: Path, otherwise: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found(tmp_path / "other", f"init_from={run_dir}")
    said = capsys.readouterr().out
    assert f"{run_dir}/checkpoints/6 was trained otherwise; from here on:" in said
    assert "JAX_DEFAULT_MATMUL_PRECISION: was None, is highest" in said


def test_flags_of_xla_count_but_for_what_they_print_and_the_number_of_devices(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = os.environ["XLA_FLAGS"]
    free = "--xla_force_host_platform_device_count=3 --xla_dump_to=there"
    monkeypatch.setenv("XLA_FLAGS", free)
    found(run_dir)
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_enable_fast_math=true")
    message = refusal(run_dir)
    assert "XLA_FLAGS: was , is --xla_cpu_enable_fast_math=true" in message
    assert "(in the environment: XLA_FLAGS left out)" in message


def test_other_versions_and_devices_are_said_and_go_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxlib.__version__", "9.9")
    found(run_dir)
    assert re.search(r"jaxlib: was [\d.]+, is 9\.9", capsys.readouterr().out)


def test_every_setting_of_the_list_is_one_of_jaxs() -> None:
    """Of the installed version's, or of another's that a run may come from or go to."""
    others = {"jax_default_dtype_bits"}
    if jax.__version_info__ < (0, 12):
        others |= {"jax_accurate_erf_inv", "jax_use_hlo_logistic_lowering", "jax_custom_jvp3",
                   "jax_remat_barrier_no_cotangents"}  # fmt: skip
    else:
        others |= {"jax_exec_time_optimization_effort", "jax_memory_fitting_effort"}
    assert set(numerics.SETTINGS) - set(jax.config.values) == others


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_a_debug_flag_of_jax_stays_on(flag: str, tmp_path: Path) -> None:
    jax.config.update(flag, True)
    try:
        with debug.checks(configured(tmp_path)):
            assert numerics.setting(flag)
    finally:
        jax.config.update(flag, False)


# The converter asks the same


def converted(*words: object) -> int:
    return main([*map(str, words)], runs="training.runtime.runs:RUNS")


def test_a_damaged_run_is_not_converted_but_its_checkpoint_alone_is(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run_dir / "metrics.jsonl", DAMAGE["missing"][0])
    assert converted("run", run_dir, tmp_path / "out", "--to", "nnx") == 1
    said = capsys.readouterr().err
    assert "refused: " in said and "row 5 (step 4) is missing" in said
    assert not (tmp_path / "out").exists()

    alone = run_dir / "checkpoints" / "6"
    assert f"Of the checkpoint alone, {alone}, they are no part: convert that." in said
    assert converted("run", alone, tmp_path / "out", "--to", "nnx") == 0


def test_a_converted_run_vouches_for_its_files_too(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert converted("run", run_dir, out, "--to", "nnx") == 0
    assert converted("verify", run_dir, out) == 0
    assert "ok          files beside it" in capsys.readouterr().out
    found(out, "stage=nnx")

    edit(out / "metrics.jsonl", DAMAGE["changed"][0])
    assert converted("verify", run_dir, out) == 1
    said = capsys.readouterr().out
    assert "FAILED      files beside it" in said and "row 3 (step 3) was changed" in said
