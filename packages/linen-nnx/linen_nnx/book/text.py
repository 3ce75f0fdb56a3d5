"""Rule books as YAML: a module of its own, as yaml is not light and not always needed."""

from typing import Any

import yaml

# libyaml's parser where it is there: a book of 5000 rules takes 0.4 s instead of 4 s.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LEVELS = 32  # that a book nests: its own grammar has six, and a note may hold what it likes
_NODES = 1 << 22  # of a book with its aliases written out: 40,000 rules have a million


def parse(text: str) -> Any:
    """The content of YAML. Raises `ValueError` for what is none, or is not meant to be read."""
    try:
        _Size().check(text)
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Size:
    """How deep a document nests, and how many nodes it has once its aliases are written out.

    Nine lines of YAML can stand for a billion nodes, each line naming the one before it nine times:

        a: &a [x, x, x]
        b: &b [*a, *a, *a]        12 nodes, and so on: three times as many in each line
        c: [*b, *b, *b]

    The events of the parser say so before anything is built. Tags are refused with them: a rule
    book needs none, and what they make (`!!int ""`, `!!timestamp x`) fails in ways of its own.
    """

    def __init__(self) -> None:
        self.open: list[tuple[str | None, int]] = []
        """The anchors of the nodes that the parser is in, and their sizes so far."""
        self.anchors: dict[str, int] = {}

    def check(self, text: str) -> None:
        """Raises `ValueError` for a document that is too deep, too large, or has tags."""
        for event in yaml.parse(text, Loader=_LOADER):
            if getattr(event, "tag", None) is not None:
                raise ValueError(
                    f"line {event.start_mark.line + 1}: the tag {event.tag} is not taken"
                )
            if isinstance(event, yaml.AliasEvent):
                self._add(self._size_of(event))
            elif isinstance(event, yaml.ScalarEvent):
                self._close(event.anchor, 1)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.open.append((event.anchor, 1))
                if len(self.open) > _LEVELS:
                    line = event.start_mark.line + 1
                    raise ValueError(f"line {line}: it nests more than {_LEVELS} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close(*self.open.pop())

    def _size_of(self, event: Any) -> int:
        if event.anchor not in self.anchors:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line}: `*{event.anchor}` names nothing that ends before it")
        return self.anchors[event.anchor]

    def _close(self, anchor: str | None, size: int) -> None:
        if anchor is not None:
            self.anchors[anchor] = size
        self._add(size)

    def _add(self, size: int) -> None:
        if size > _NODES:
            raise ValueError(f"it stands for more than {_NODES} nodes once aliases are written out")
        if self.open:
            anchor, so_far = self.open[-1]
            self.open[-1] = anchor, so_far + size


def write(book: dict[str, Any]) -> str:
    """The YAML of a rule book's mapping: its ops, candidates and pairs take one line each.

    The likely rules of open leaves follow the rules as comments, ready to be uncommented.
    """
    likely = [entry.pop("likely") for entry in book.get("unassigned", ()) if "likely" in entry]
    head = {key: value for key, value in book.items() if key not in ("unassigned", "draws")}
    text = _dumped({**head, "rules": _shortened(book["rules"])})
    if likely:
        text = text.removesuffix("rules: []\n") + "rules:\n" * (not book["rules"])
        text += "# Likely, but not proven. Where one is right, uncomment it and delete its leaves\n"
        text += "# from `unassigned`.\n"
        rules = {_dumped(_shortened([rule])): None for rule in likely}  # each once
        text += "".join(f"# {line}\n" for rule in rules for line in rule.splitlines())
    if open_leaves := book.get("unassigned"):
        entries = [{**entry, "candidates": _OneLine(entry["candidates"])} for entry in open_leaves]
        text += _dumped({"unassigned": entries})
    if draws := book.get("draws"):
        pairings = [
            {**entry, "given": _Pairs(entry["given"]), "pairs": list(map(_Pairs, entry["pairs"]))}
            for entry in draws
        ]
        text += _dumped({"draws": pairings})
    return text


def _shortened(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**rule, "ops": _OneLine(rule["ops"])} if "ops" in rule else rule for rule in rules]


def _dumped(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)


class _OneLine(list[Any]):
    """A list that YAML writes on one line."""


class _Pairs(dict[str, Any]):
    """A mapping that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _OneLine,
    lambda dumper, ops: dumper.represent_sequence("tag:yaml.org,2002:seq", ops, flow_style=True),
)
_Dumper.add_representer(
    _Pairs,
    lambda dumper, pair: dumper.represent_mapping("tag:yaml.org,2002:map", pair, flow_style=True),
)
