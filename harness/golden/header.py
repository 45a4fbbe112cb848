"""What a golden says beside its columns: two JSON texts, as types that are checked.

`Header` is the file's metadata entry `harness`: how and from what the golden was made, and its
history. `Contents` is the column `contents`: one row per tensor, which may be many. To keep
something new of the whole file, add a field here; to keep something new of each tensor, add it to
`harness.golden.columns`.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, TypeVar

import msgspec

from harness.fingerprints.residues import BLOCK_NUMEL, Bits
from harness.fingerprints.sketch import NUM_PROJECTIONS, SEED
from harness.golden.golden import PartName, Update
from harness.streaming.chunks import CHUNK_NBYTES

SCHEMA = 0  # free to change until the first release

_T = TypeVar("_T")
_Size = Annotated[int, msgspec.Meta(ge=0)]
_Tolerance = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]


class Made(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What has to be the same for two fingerprints to be comparable."""

    digest: str = "blake3"
    chunk_nbytes: int = CHUNK_NBYTES
    projections: int = NUM_PROJECTIONS
    seed: int = SEED
    residue_block_numel: int = BLOCK_NUMEL


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights come from; see `Golden`."""

    path: str
    section: str | None


class Part(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How one fingerprint was made: that of the `weights`, `buffers` or `outputs`.

    `tolerance` is the (atol, rtol) of its residues, of so many `bits`; `rel` is added to atol, as a
    share of each tensor's own rms.
    """

    container: str
    keeps_aliases: bool
    block_nbytes: Annotated[int, msgspec.Meta(gt=0, le=CHUNK_NBYTES)]
    tolerance: tuple[_Tolerance, _Tolerance]
    rel: _Tolerance = 0.0
    bits: Bits | None = None


class Live(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The code under test; see `LiveRecord`."""

    target: str | None
    stages: tuple[str, ...]
    config: str | None
    inputs: str | None
    base: str | None = None


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int
    made: Made
    source: Origin
    root: str
    parts: dict[PartName, Part]
    history: tuple[Update, ...]
    live: Live | None


class Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor; `keeps` names the fields of its fingerprint that the columns hold.

    An alias keeps nothing: all it has is what its original has, which stands before it.
    """

    key: str
    dtype: str
    shape: tuple[_Size, ...]
    keeps: tuple[str, ...] = ()
    alias_of: str | None = None


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tensors of each part, in order; what the checkpoint says of the model, and the code."""

    parts: dict[PartName, tuple[Row, ...]]
    parameters: tuple[tuple[str, bool], ...] = ()
    config: dict[str, Any] | None = None
    members: dict[str, str] = {}


class Versioned(msgspec.Struct):
    """A header of any schema."""

    schema: int


def to_json(value: msgspec.Struct) -> str:
    """Canonical JSON: the same text for the same value; keys sorted, no spaces, ASCII alone."""
    # Not by msgspec, whose strings are UTF-8: a key may have half of a surrogate pair.
    return json.dumps(msgspec.to_builtins(value), sort_keys=True, separators=(",", ":"))


def from_json(text: str | bytes, kind: type[_T]) -> _T:
    """Read a text by its type; raises ValueError that says what is wrong and where."""
    try:
        return msgspec.convert(json.loads(text), kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        name = where.rstrip("`").removeprefix(".") or kind.__name__.strip("_").lower()
        raise ValueError(f"{name}: {what.replace('`', '')}") from error
