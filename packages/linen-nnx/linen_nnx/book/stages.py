"""The four stages of a migration, and the form of each part of a model at each.

    stage         root    parts not yet ported    parts ported
    linen         Linen   linen                   linen
    nnx_in_linen  Linen   linen                   nnx
    linen_in_nnx  nnx     linen                   nnx
    nnx           nnx     nnx                     nnx

A model of one part is bridged whole: ported at `nnx_in_linen`, not yet at `linen_in_nnx`.
"""

from collections.abc import Collection, Mapping

from linen_nnx.book.specs import Side

STAGES: dict[str, Side] = {
    "linen": "linen",
    "nnx_in_linen": "linen",
    "linen_in_nnx": "nnx",
    "nnx": "nnx",
}
"""The framework of the root at each stage."""

WHOLE = ""
"""The name of the part where there is only one."""

Forms = Mapping[str, Side]
"""The form of each part."""


def forms_at(stage: str, parts: Collection[str], ported: Collection[str]) -> dict[str, Side]:
    """The form of each part at a stage.

    Args:
      stage: a key of `STAGES`.
      parts: the names of the parts; `WHOLE` alone for a model of one.
      ported: the parts that are nnx at both hybrid stages.

    Example:
      >>> forms_at("nnx_in_linen", ["torso", "critic"], ["torso"])
      {'torso': 'nnx', 'critic': 'linen'}
      >>> forms_at("linen_in_nnx", [WHOLE], [WHOLE])
      {'': 'linen'}
    """
    # A model of one part has no second part to be the other half of a hybrid: it is bridged.
    if WHOLE in parts:
        return {WHOLE: "nnx" if stage in ("nnx_in_linen", "nnx") else "linen"}
    # The same parts are ported at both hybrid stages: only the root changes between them.
    hybrid = stage in ("nnx_in_linen", "linen_in_nnx")
    result: dict[str, Side] = {}
    for part in parts:
        is_nnx = stage == "nnx" or (hybrid and part in ported)
        result[part] = "nnx" if is_nnx else "linen"
    return result
