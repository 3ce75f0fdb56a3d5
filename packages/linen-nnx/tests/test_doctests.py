"""The examples in docstrings are true."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import linen_nnx

ROOT = Path(linen_nnx.__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "linen_nnx").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where an example may leave its files

    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)

    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_shows_how_it_is_used() -> None:
    silent = [
        name
        for name in linen_nnx.__all__
        if ">>> " not in (getattr(linen_nnx, name).__doc__ or "")
        and not issubclass_of_exception(getattr(linen_nnx, name))
    ]
    assert silent == []


def issubclass_of_exception(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)
