"""The command line: what it prints, what it returns, and what it does not import."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
from convert_helpers import RENAMES, linen_state, save

from linen_nnx.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save(folder / "linen", linen_state(optax.adamw(1e-2)))
    RENAMES.save(folder / "rules.yaml")
    return folder


def run_json(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_shows_the_tree_and_the_layout(source, capsys):
    assert main(["inspect", str(source / "linen")]) == 0
    text = capsys.readouterr().out
    assert "params/blk_0/kernel          float32[8,8]  256 B" in text
    assert "Orbax item: TrainState" in text
    content = run_json(capsys, "inspect", source / "linen")
    assert {"path": "step", "spec": "int64[]", "bytes": 8, "type": "scalar"} in content["leaves"]


def test_plan_shows_what_happens_to_every_leaf_and_writes_nothing(source, capsys):
    before = sorted(source.rglob("*"))
    arguments = ["plan", source / "linen", "--to", "nnx", "--rules", source / "rules.yaml"]
    assert main([*map(str, arguments)]) == 0
    text = capsys.readouterr().out
    rule = "params/blk_{i}/{name}  ->  blocks/{i}/{name}\n"
    assert f"{rule}    24 leaves: 6 in params, 12 in opt_state, 6 in ema (name)\n" in text
    assert "43 name, 1 stream" in text
    assert main([*map(str, arguments), "--leaves"]) == 0
    leaf = "name    params/blk_0/bias\n        ->  model/blocks/0/bias/value "
    assert leaf in capsys.readouterr().out
    content = run_json(capsys, *arguments)
    moved = [job for job in content["jobs"] if job["from"] == ["params/out/bias"]]
    assert moved[0]["to"] == ["model/out/bias/value"]
    assert moved[0]["engine"] == "name"
    assert moved[0]["rule"] == "`params/out/{name}` <-> `out/{name}`"
    assert sorted(source.rglob("*")) == before


def test_run_and_verify_report(source, tmp_path, capsys):
    out = tmp_path / "nnx"
    rules = ["--rules", source / "rules.yaml"]
    content = run_json(capsys, "run", source / "linen", out, "--to", "nnx", *rules)
    assert content["status"] == "done"
    assert content["reports"][0]["found"] == "Orbax item: TrainState"
    assert {p.name for p in out.iterdir()} >= {"report.json", "rules.yaml", "digests.json"}
    content = run_json(capsys, "verify", source / "linen", out)
    assert content["passed"] is True
    (out / "_sharding").write_text("{}")
    assert main(["verify", str(source / "linen"), str(out)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_refusals_exit_with_one_and_mistakes_with_two(source, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "missing")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["plan", str(source / "linen"), "--to", "nnxx", "--rules", "x"]) == 1
    assert "did you mean `nnx`?" in capsys.readouterr().err
    assert main(["plan", str(source / "linen"), "--to", "linen_in_nnx"]) == 1
    assert "stages are for checkpoints that say the form of their parts" in capsys.readouterr().err
    assert main(["plan", str(source / "linen"), "--to", "nnx", "--rules", "no.yaml"]) == 1
    assert capsys.readouterr().err == "refused: no.yaml: No such file or directory\n"
    with pytest.raises(SystemExit) as caught:
        main(["run", str(source / "linen")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: linen-nnx run")


@pytest.mark.parametrize(
    ("mistyped", "said"),
    [
        ("inspekt x", "linen-nnx: error: unknown command `inspekt`; did you mean `inspect`?"),
        ("plan x --tto nnx", "linen-nnx plan: error: unknown option `--tto`; did you mean `--to`?"),
        ("run a b --to nnx --lnik=1", "unknown option `--lnik`; did you mean `--link`?"),
        ("destroy x", "unknown command `destroy`; known: inspect, suggest, plan, run, verify, "),
        ("convert x", "unknown command `convert`; did you mean `run`?"),
        ("run a b --target nnx", "unknown option `--target`; did you mean `--to`?"),
    ],
)
def test_a_mistyped_command_or_option_is_told_the_nearest(mistyped, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(mistyped.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_plan_of_many_layers_in_one_leaf_stays_narrow(tmp_path, capsys):
    blocks = {"params": {"blocks": {"kernel": jnp.ones((40, 3)), "long_name": jnp.ones((40, 3))}}}
    save(tmp_path / "linen", blocks)
    stack = {"op": "stack", "capture": "i", "axis": 0}
    rule = {"linen": "params/blocks/{name}", "nnx": "blocks/{i}/{name}", "ops": [stack]}
    (tmp_path / "rules.yaml").write_text(json.dumps({"version": 1, "rules": [rule]}))
    arguments = ["plan", tmp_path / "linen", "--to", "nnx", "--rules", tmp_path / "rules.yaml"]
    assert main([*map(str, arguments)]) == 0
    rule = "  stack(capture i, axis 0)\n    2 leaves: in params (stream)\n"
    assert rule in capsys.readouterr().out
    assert main([*map(str, arguments), "--leaves"]) == 0
    text = capsys.readouterr().out
    assert "->  blocks/0/kernel/value, ... (40)" in text
    assert "the first is shown" in text and "--json" in text
    jobs = run_json(capsys, *arguments)["jobs"]
    assert jobs[0]["to"] == [f"blocks/{i}/kernel/value" for i in range(40)]


def test_rekeying_and_help_import_nothing_heavy(source, tmp_path):
    save(tmp_path / "plain", {"params": {"a": jnp.ones((30, 30))}})
    rule = {"linen": "params/{name}", "nnx": "{name}"}
    (tmp_path / "plain.json").write_text(json.dumps({"version": 1, "rules": [rule]}))
    (tmp_path / "plain.yaml").write_text("version: 1\nrules: [{linen: 'params/a', nnx: 'b'}]")
    code = f"""
import os, sys
from linen_nnx.cli import main

def absent(*names):
    assert not set(names) & set(sys.modules), sys.modules.keys()

try:
    main(["--help"])
except SystemExit:
    pass
os.chdir({str(tmp_path)!r})
for out, rules in (("a", "plain.json"), ("b", "plain.yaml")):
    absent("jax", "flax", "orbax", "tensorstore", "numpy", "ml_dtypes", "yaml")
    assert main(["run", "plain", out, "--to", "nnx", "--rules", rules]) == 0
assert main(["inspect", "b"]) == 0
absent("jax", "flax", "orbax", "tensorstore", "numpy", "ml_dtypes")
full = {str(source / "linen")!r}
assert main(["run", full, "c", "--to", "nnx", "--rules", {str(source / "rules.yaml")!r}]) == 0
assert main(["verify", full, "c"]) == 0
absent("jax", "flax", "orbax")
"""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_version_is_that_of_the_installed_library(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"linen-nnx (linen-nnx {metadata.version('linen-nnx')})\n"


def test_tables_and_on_a_terminal_sentences_fit_80_columns(source, tmp_path, capsys, monkeypatch):
    deep = {"params": {"a_block_of_many_layers": {"self_attention": {"query": jnp.ones((3, 4))}}}}
    rules = ["--rules", str(source / "rules.yaml")]
    save(tmp_path / "deep", {**deep, "ema": deep["params"]})
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for words in (
        ["inspect", str(tmp_path / "deep")],
        ["plan", str(source / "linen"), "--to", "nnx", *rules],
        ["plan", str(source / "linen"), "--to", "nnx", *rules, "--leaves"],
        ["plan", str(tmp_path / "deep"), "--to", "nnx", *rules],
    ):
        main(words)
        captured = capsys.readouterr()
        lines = (captured.out + captured.err).replace(str(tmp_path), "").splitlines()
        assert max(map(len, lines)) <= 80, words


def test_a_long_table_keeps_its_columns(tmp_path, capsys):
    save(tmp_path / "linen", {"params": {"a": jnp.ones(3), "long_name": jnp.ones((10, 10))}})
    assert main(["inspect", str(tmp_path / "linen")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].index("float32") == lines[1].index("float32")
