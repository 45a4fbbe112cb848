"""A fingerprint as a table for people, stable enough for git to diff: `harness show`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from harness.fingerprints.fingerprint import Fingerprint
from harness.fingerprints.stats import Stats
from harness.golden.golden import Update
from harness.text.folding import escaped, printable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def render_table(
    fingerprint: Fingerprint, *, history: tuple[Update, ...] = (), stats: bool = False
) -> str:
    """Head lines, then one line a tensor: key, dtype, shape, digest, and stats if asked for."""
    return "\n".join([*_head(fingerprint, history), "", *_rows(fingerprint, stats)])


def told(update: Update) -> str:
    """An entry of the history on one line, whatever the reason holds."""
    return f"{escaped(update.root[:16])}  {escaped(update.reason) or '(no reason given)'}"


def _head(fingerprint: Fingerprint, history: tuple[Update, ...]) -> Iterator[str]:
    originals = [t for t in fingerprint.tensors.values() if t.alias_of is None]
    numel = sum(prod(tensor.shape) for tensor in originals)
    section = f", section {escaped(fingerprint.section)}" if fingerprint.section else ""
    yield f"root       {fingerprint.root.hex()}"
    yield f"container  {escaped(fingerprint.container)}{section}"
    yield (
        f"tensors    {len(fingerprint.tensors):,}, {numel:,} numbers, "
        f"{_size(sum(tensor.nbytes for tensor in originals))}"
    )
    yield from (f"replaced   {told(update)}" for update in history)


def _rows(fingerprint: Fingerprint, with_stats: bool) -> Iterator[str]:
    rows = [("key", "dtype", "shape", "digest", *(_STATS if with_stats else ()))]
    for tensor in fingerprint.tensors.values():
        digest = (tensor.digest or b"").hex()[:16]
        if tensor.alias_of is not None:
            digest += f" = {printable(tensor.alias_of)}"
        numbers = _numbers(tensor.stats) if with_stats else ()
        rows.append(
            (printable(tensor.key), tensor.dtype.name, str(list(tensor.shape)), digest, *numbers)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


_STATS = ("min", "max", "mean", "std", "l2", "zeros", "nan", "inf")


def _numbers(stats: Stats | None) -> tuple[str, ...]:
    if stats is None:
        return ("-",) * len(_STATS)
    return (
        *(f"{value:.6g}" for value in (stats.min, stats.max, stats.mean, stats.std, stats.l2)),
        *(str(n) for n in (stats.num_zero, stats.num_nan, stats.num_posinf + stats.num_neginf)),
    )


def _size(nbytes: float) -> str:
    for unit in _UNITS:
        if nbytes < 1024 or unit == _UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError
