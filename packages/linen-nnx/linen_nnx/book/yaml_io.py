"""Rule books as YAML: a module of its own, as yaml is not light and not always needed.

>>> print(write({"version": 1, "rules": [{"linen": "params/fc/kernel", "nnx": "fc/kernel"}]}))
version: 1
rules:
- linen: params/fc/kernel
  nnx: fc/kernel
<BLANKLINE>
>>> parse("rules: [{nnx: fc/kernel}]")
{'rules': [{'nnx': 'fc/kernel'}]}
"""

from typing import Any

import yaml

# libyaml's parser where it is there: a book of 5000 rules takes 0.4 s instead of 4 s.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Levels that a book nests: its own grammar has six, and a note may hold anything.
_LEVELS = 32
# Nodes of a book with its aliases written out: 40,000 rules have a million.
_NODES = 1 << 22


def parse(text: str) -> Any:
    """The content of YAML. Raises `ValueError` for what is none, or is not meant to be read."""
    try:
        # First by its events, which cost no more memory than the text; then as dicts and lists.
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
                # Its size is known now, and goes to the node around it.
                self._close(*self.open.pop())

    def _size_of(self, event: Any) -> int:
        if event.anchor not in self.anchors:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line}: `*{event.anchor}` names nothing that ends before it")
        return self.anchors[event.anchor]

    def _close(self, anchor: str | None, size: int) -> None:
        """Counts a node that ends here; an alias may name it from now on."""
        if anchor is not None:
            self.anchors[anchor] = size
        self._add(size)

    def _add(self, size: int) -> None:
        """Counts nodes into the one that the parser is in."""
        if size > _NODES:
            raise ValueError(f"it stands for more than {_NODES} nodes once aliases are written out")
        if self.open:
            anchor, so_far = self.open[-1]
            self.open[-1] = anchor, so_far + size


def write(book: dict[str, Any]) -> str:
    """The YAML of a rule book's mapping: its ops, candidates and pairs take one line each.

    The likely rules of open leaves follow the rules as comments, ready to be uncommented.
    """
    likely = []
    entries = []
    for entry in book.get("unassigned", ()):
        if "likely" in entry:
            likely.append(entry.pop("likely"))
        entries.append({**entry, "candidates": _OneLine(entry["candidates"])})
    head = {key: value for key, value in book.items() if key not in ("unassigned", "draws")}
    text = _dumped({**head, "rules": [_shortened(rule) for rule in book["rules"]]})
    if likely:
        # Below `rules: []` a rule that is uncommented would be no YAML.
        if not book["rules"]:
            text = text.removesuffix("rules: []\n") + "rules:\n"
        text += _commented(likely)
    if entries:
        text += _dumped({"unassigned": entries})
    if draws := book.get("draws"):
        pairings = []
        for entry in draws:
            given, pairs = _OneLineMap(entry["given"]), list(map(_OneLineMap, entry["pairs"]))
            pairings.append({**entry, "given": given, "pairs": pairs})
        text += _dumped({"draws": pairings})
    return text


def _commented(rules: list[dict[str, Any]]) -> str:
    """Likely rules as comments that a person can uncomment."""
    text = "# Likely, but not proven. Where one is right, uncomment it and delete its leaves\n"
    text += "# from `unassigned`.\n"
    # Each once: all leaves that one rule would close have it.
    for rule in dict.fromkeys([_dumped([_shortened(rule)]) for rule in rules]):
        for line in rule.splitlines():
            text += f"# {line}\n"
    return text


def _shortened(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule whose ops take one line."""
    return {**rule, "ops": _OneLine(rule["ops"])} if "ops" in rule else rule


def _dumped(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)


class _OneLine(list[Any]):
    """A list that YAML writes on one line."""


class _OneLineMap(dict[str, Any]):
    """A mapping that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    """Of its own, as representers are added to a class, and yaml's own one is everybody's."""


def _one_line(dumper: Any, items: Any) -> Any:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


def _one_line_map(dumper: Any, items: Any) -> Any:
    return dumper.represent_mapping("tag:yaml.org,2002:map", items, flow_style=True)


_Dumper.add_representer(_OneLine, _one_line)
_Dumper.add_representer(_OneLineMap, _one_line_map)
