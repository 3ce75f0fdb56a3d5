"""`inspect`: what lies at a path, leaf by leaf."""

from linen_nnx.cli.models import runs_named
from linen_nnx.cli.output import amount, print_json, say, spec_of, table


def inspect(
    ckpt: str,
    as_json: bool,
    step: float | None,
    item: str | None,
    prefix: list[str],
    runs: str | None,
) -> int:
    """Shows the tree of a checkpoint, and what its layout is."""
    from linen_nnx.book.rules import RuleBook
    from linen_nnx.disk.beside import items_beside, source_of
    from linen_nnx.disk.describe import describe
    from linen_nnx.disk.finding import find
    from linen_nnx.disk.sides import guess_side
    from linen_nnx.disk.state import Form, read_state

    source = find(ckpt, step, item, prefix=prefix, runs=runs_named(runs))
    leaves, book = source.leaves, RuleBook([])
    if source.said is None:
        described = describe(leaves)
        form = Form(guess_side(leaves, book) or "nnx")
    else:
        described, form = None, Form("linen", source.said.stage, source.said.forms)
    # A tree that says nothing of itself is called by what it looks like.
    layout = described or read_state(leaves, form, book).layout
    beside: dict[str, int] = {}
    for name, path in items_beside(source).items():
        beside[name] = len(source_of(source, path).leaves)

    if as_json:
        content = []
        for leaf in leaves:
            spec = spec_of(leaf)
            content.append(
                {"path": leaf.path, "spec": spec, "bytes": leaf.nbytes, "type": leaf.value_type}
            )
        found = {"found": str(source), "layout": layout, "notes": source.notes, "beside": beside}
        print_json({**found, "leaves": content})
        return 0
    table([(leaf.path, spec_of(leaf), amount(leaf.nbytes)) for leaf in leaves], long=1)
    total = sum(leaf.nbytes for leaf in leaves)
    say(f"\n{source}: {layout}\n{len(leaves)} leaves, {amount(total)}")
    for name, count in beside.items():
        say(f"beside   item `{name}`, {count} leaves (--item {name} shows them)")
    for note in source.notes:
        say(f"note     {note}")
    return 0
