"""The site that `make docs` builds: its pages, its navigation, and how docstrings are read.

Sphinx reads every page where it lies, from the top of the repository, so that a link between two
pages means the same here and on the site. Each warning ends the build: a link to a page, a heading
or a picture that there is not, a page that the navigation leaves out, a name that cannot be
imported.
"""

import re
from pathlib import Path
from typing import Any

# Every page of the site below the heading of its section: its file without the suffix, its title.
NAVIGATION = {
    "Start": {
        "docs/install": "Installing",
        "docs/compared": "What it has, what it lacks",
        "CONTRIBUTING": "Contributing",
        "CHANGELOG": "Changelog",
    },
    "Train through the migration": {
        "docs/migrate": "From Linen to nnx, rung by rung",
        "docs/running": "Running, continuing, scaling",
        "docs/family": "A new family",
        "docs/data": "Data",
        "docs/optimizers": "Optimizers",
        "docs/converting": "Converting",
        "examples/README": "Examples",
    },
    "Migrate checkpoints: linen-nnx": {
        "packages/linen-nnx/README": "The library",
        "packages/linen-nnx/docs/rules": "Rule books",
        "packages/linen-nnx/docs/ladder": "The ladder",
        "packages/linen-nnx/docs/formats": "Formats",
        "packages/linen-nnx/docs/buckets": "Buckets",
        "packages/linen-nnx/docs/optax": "Optimizers' states",
        "packages/linen-nnx/docs/pitfalls": "Pitfalls",
        "packages/linen-nnx/examples/train_state/README": "Example: a TrainState",
        "packages/linen-nnx/examples/vit/README": "Example: a vision transformer",
        "packages/linen-nnx/examples/seq2seq/README": "Example: an LSTM",
        "packages/linen-nnx/examples/bert/README": "Example: BERT",
    },
    "Reference": {
        "docs/api": "The template's interface",
        "packages/linen-nnx/docs/api": "The library's interface",
        "docs/modules": "The template's modules",
        "packages/linen-nnx/docs/modules": "The library's modules",
        "docs/speed": "How fast",
        "docs/scale": "How cost grows",
    },
}

# The packages whose modules the page of the template's interface describes.
DESCRIBED = ("training", "model", "configs")

# What opens a section of a docstring.
SECTION = re.compile(r"^(?:Args|Attributes|Example|Raises|Returns|Yields):$", re.MULTILINE)

project = "From Flax Linen to Flax NNX"
root_doc = "README"
include_patterns = [
    f"{page}.{suffix}"
    for page in ("*", "docs/*", "examples/*", "packages/*/*", "packages/*/docs/*")
    for suffix in ("md", "rst")
] + ["packages/*/examples/*/*.md"]
# Folders that hold no page of the project: these are not walked through.
exclude_patterns = [".*", "build", "runs", "multirun", "outputs", "**/data", "**/build"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["html_image"]  # the figure of README.md is an <img>, for its height
myst_heading_anchors = 3  # `page.md#a-heading`, as the hosts of repositories make them

napoleon_use_ivar = True  # an attribute that is a property, too, is described once
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # a default as it is written, not as it is printed
python_maximum_signature_line_length = 88
highlight_language = "none"  # a block without a mark is what a command prints

html_theme = "furo"
html_title = project
html_css_files = html_static_path = ["site.css"]
html_extra_path = ["index.html"]  # leads to README.html, the first page
html_show_copyright = False
html_copy_source = False


def setup(app: Any) -> None:
    """Tells Sphinx of the functions below; the last comes before its own reader of sections."""
    app.connect("source-read", _add_navigation)
    app.connect("source-read", _add_modules)
    app.connect("autodoc-process-docstring", _read_docstring, priority=400)


def _add_navigation(_app: Any, shown: str, source: list[str]) -> None:
    """Appends the navigation to the first page: README.md has no need of it in the repository.

    `source` holds the page's text and is changed in place, as Sphinx wants it.
    """
    if shown != root_doc:
        return
    for section, pages in NAVIGATION.items():
        listed = "\n".join(f"{title} </{page}>" for page, title in pages.items())
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {section}\n\n{listed}\n```\n"


def _add_modules(_app: Any, shown: str, source: list[str]) -> None:
    """Appends each module of `DESCRIBED` to the page of interfaces, so that none is forgotten."""
    if shown != "docs/api":
        return
    top = Path(__file__).parent.parent
    for package in DESCRIBED:
        for file in sorted((top / package).glob("*.py")):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            if file.read_text():
                source[0] += (
                    f"\n{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
                )


def _read_docstring(
    _app: Any, kind: str, _name: str, _thing: Any, _: Any, lines: list[str]
) -> None:
    """Turns what our docstrings share with Markdown into what Sphinx reads; changes `lines`.

    A name in single backticks is code, whatever follows it, as in "`Rule`s"; a paragraph indented
    by four spaces stays as it is written. Below the first section ("Args:") indentation means
    something else.
    """
    text = "\n".join(lines)
    section = SECTION.search(text)
    start = section.start() if section else len(text)
    paragraphs = [
        f"::\n\n{paragraph}" if paragraph.startswith("    ") else _mark_code(paragraph)
        for paragraph in text[:start].split("\n\n")
    ]
    lines[:] = ("\n\n".join(paragraphs) + _mark_code(text[start:])).split("\n")
    if kind in ("attribute", "property"):
        lines[:0] = ["..", ""]  # a comment; else what precedes a colon is taken for a type


def _mark_code(text: str) -> str:
    """The text with ``name`` for `name`; the backslash parts it from a letter that follows."""
    return re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``\\ ", text)
