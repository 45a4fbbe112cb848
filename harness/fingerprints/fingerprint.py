"""What a fingerprint is: per tensor digest, statistics and sketch, and one root for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from blake3 import blake3

from harness.checkpoint.dtypes import DType
from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.fingerprints.hashes import Hashes
from harness.fingerprints.residues import DEFAULT_TOLERANCE, Residues
from harness.fingerprints.sketch import DEFAULT_BLOCK_NBYTES, Sketch
from harness.fingerprints.stats import Stats
from harness.streaming.chunks import chunks
from harness.text.disclosure import may_keep
from harness.text.folding import shortened

MAX_KEPT_NUMEL = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFingerprint:
    """The fingerprint of one tensor; `values` are its logical bytes where they are kept."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    digest: bytes | None
    alias_of: str | None = None
    stats: Stats | None = None
    values: bytes | None = None
    sketch: Sketch | None = None
    residues: Residues | None = None
    hashes: Hashes | None = None

    def __repr__(self) -> str:
        digest = "" if self.digest is None else f", digest {self.digest.hex()[:16]}"
        form = f"{self.dtype} {list(self.shape)}"
        return f"<TensorFingerprint {shortened(self.key, 60)}: {form[:80]}{digest}>"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def rms(self) -> float:
        """The root of its mean square; 0 where that is not known."""
        return 0.0 if self.stats is None else self.stats.rms(self.numel)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with logical bytes from `start`, if the values are kept."""
        if self.values is None:
            raise ValueError(f"the values of {self.key!r} are not kept")
        buffer[:] = self.values[start : start + len(buffer)]

    def part(self, start: int, nbytes: int) -> TensorFingerprint:
        """The same, with these values alone."""
        values = None if self.values is None else self.values[start : start + nbytes]
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Excerpt(**held | {"values": values, "first": start})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Excerpt(TensorFingerprint):
    """What a large tensor's values, from byte `first` on, are to another process."""

    first: int

    def read_into(self, start: int, buffer: memoryview) -> None:
        TensorFingerprint.read_into(self, start - self.first, buffer)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is known of a checkpoint; `name` says where it came from.

    `unread` entries are not among the `tensors`, and `others` are the parts of the file that are
    not, with how many tensors they hold: see `harness.checkpoint.tensors.Checkpoint`.

    `tolerance` (atol, rtol) is what a comparison with this allows by default; to atol comes `rel`,
    as a share of each tensor's own rms. For it residues of so many `bits` are kept (None: none).
    """

    name: str
    container: str
    section: str
    tensors: Mapping[str, TensorFingerprint]
    unread: tuple[str, ...] = ()
    others: tuple[tuple[str, int | None], ...] = ()
    keeps_aliases: bool = True
    block_nbytes: int = DEFAULT_BLOCK_NBYTES
    tolerance: tuple[float, float] = DEFAULT_TOLERANCE
    rel: float = 0.0
    bits: Literal[4, 8] | None = None
    config: Mapping[str, Any] | None = None
    members: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        has_root = all(tensor.digest is not None for tensor in self.tensors.values())
        root = f"root {self.root.hex()[:16]}" if has_root else "not read"
        name = f"{shortened(self.name, 60)} ({self.container})"
        return f"<Fingerprint {name}: {len(self.tensors):,} tensors, {root}>"

    @cached_property
    def root(self) -> bytes:
        """One name of 32 bytes for the whole model, the same in every container."""
        hasher = blake3(b"checkpoint-harness root 1\n")
        rows = ((key.encode("utf-8", "surrogatepass"), t.digest) for key, t in self.tensors.items())
        for key, digest in sorted(rows, key=lambda row: row[0]):
            if digest is None:
                raise ValueError("a fingerprint without digests has no root")
            hasher.update(len(key).to_bytes(8, "little") + key + digest)
        return hasher.digest()


def structure(checkpoint: Checkpoint | Fingerprint) -> Fingerprint:
    """The keys, dtypes and shapes alone: nothing is read but the structure, and values in it."""
    return Fingerprint(
        name=checkpoint.name,
        container=checkpoint.container,
        section=checkpoint.section,
        unread=checkpoint.unread,
        others=checkpoint.others,
        keeps_aliases=checkpoint.keeps_aliases,
        tensors={
            key: of_value(t)
            if t.dtype.is_value
            else TensorFingerprint(
                key=key, dtype=t.dtype, shape=t.shape, digest=None, alias_of=t.alias_of
            )
            for key, t in checkpoint.tensors.items()
        },
    )


def of_value(tensor: Tensor | TensorFingerprint) -> TensorFingerprint:
    """The fingerprint of a value: its text is kept where it is short, and no secret."""
    if isinstance(tensor, TensorFingerprint):
        return tensor
    text = bytearray(tensor.nbytes)
    tensor.read_into(0, memoryview(text))
    digests = [blake3(text[c.start : c.start + c.nbytes]).digest() for c in chunks(len(text))]
    # What it is called, not what it is in: `attn.key` is no secret, `attn.key.token` is one.
    own_name = tensor.key.rpartition(".")[2].rpartition("[")[2]
    keeps = len(text) <= MAX_KEPT_NUMEL and may_keep(own_name, text.decode())
    return TensorFingerprint(
        key=tensor.key,
        dtype=tensor.dtype,
        shape=tensor.shape,
        digest=digest_of(tensor.dtype, tensor.shape, digests),
        values=bytes(text) if keeps else None,
    )


def block_numel(dtype: DType, block_nbytes: int) -> int:
    """Elements of one sketch block; complex elements count as two."""
    return max(1, block_nbytes // dtype.component_nbytes)


def digest_of(dtype: DType, shape: tuple[int, ...], chunk_digests: list[bytes]) -> bytes:
    """Join the digests of a tensor's chunks into the tensor's."""
    sizes = ", ".join(map(str, shape))
    header = f'["checkpoint-harness tensor 1", "{dtype.name}", [{sizes}]]\n'
    return blake3(header.encode() + b"".join(chunk_digests)).digest()
