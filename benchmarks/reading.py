"""Counts what makes code hard or easy to read: `python -m benchmarks.reading [FOLDER ...]`.

For every package below the folders, per 1,000 non-blank lines: comments on a line of their own,
comprehensions (generator expressions among them), and conditional expressions; beside them the
lengths of modules and functions in the median and at most.

A reader finds few comments and many comprehensions tiring. Well-liked code of this field lies
between 29 and 185 comments and between 3 and 28 comprehensions per 1,000 lines.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Counts:
    """What one module holds: `lines` without blank ones, and the length of each function."""

    lines: int
    comments: int
    comprehensions: int
    conditionals: int
    functions: tuple[int, ...]


def counts(source: str) -> Counts:
    """Counts one module's text.

    Example:
        >>> found = counts("# Why.\\nsquares = [n * n for n in range(3)]\\n")
        >>> found.lines, found.comments, found.comprehensions
        (2, 1, 1)
    """
    lines = [line.strip() for line in source.splitlines()]
    nodes = list(ast.walk(ast.parse(source)))
    return Counts(
        lines=sum(line != "" for line in lines),
        comments=sum(line.startswith("#") for line in lines),
        comprehensions=sum(isinstance(node, _COMPREHENSIONS) for node in nodes),
        conditionals=sum(isinstance(node, ast.IfExp) for node in nodes),
        functions=tuple(_lengths(nodes)),
    )


def _lengths(nodes: list[ast.AST]) -> Iterator[int]:
    for node in nodes:
        if isinstance(node, _FUNCTIONS):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def packages(folder: Path) -> Iterator[tuple[str, list[Counts]]]:
    """Yields each folder below `folder` that holds modules, with the counts of its modules."""
    for package in sorted({path.parent for path in folder.rglob("*.py")}):
        modules = sorted(package.glob("*.py"))
        yield str(package), [counts(path.read_text(encoding="utf-8")) for path in modules]


def row(name: str, modules: list[Counts]) -> str:
    """One line of the table."""
    lines = sum(module.lines for module in modules)
    functions = [length for module in modules for length in module.functions] or [0]
    share = 1000 / max(lines, 1)
    comments = share * sum(module.comments for module in modules)
    comprehensions = share * sum(module.comprehensions for module in modules)
    conditionals = share * sum(module.conditionals for module in modules)
    sizes = [module.lines for module in modules]
    return (
        f"{name:<38} {lines:>6} {comments:>8.0f} {comprehensions:>8.0f} {conditionals:>8.0f}"
        f" {median(sizes):>5.0f} {max(sizes):>4} {median(functions):>5.0f} {max(functions):>4}"
    )


def main(folders: list[str]) -> None:
    """Prints the table for `folders`, the whole project where none is named."""
    print(f"{'':<38} {'':>6} {'per 1,000 lines':^26} {'module':^10} {'function':^10}")
    print(
        f"{'package':<38} {'lines':>6} {'comments':>8} {'compreh.':>8} {'ternar.':>8}"
        f" {'med':>5} {'max':>4} {'med':>5} {'max':>4}"
    )
    for folder in folders:
        found = list(packages(Path(folder)))
        for name, modules in found:
            print(row(name, modules))
        if len(found) > 1:
            print(row(f"{folder} in all", [module for _, modules in found for module in modules]))


if __name__ == "__main__":
    main(sys.argv[1:] or ["packages/linen-nnx/linen_nnx", "configs", "model", "training"])
