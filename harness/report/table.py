"""A fingerprint as a table for people, stable enough for git to diff: `harness show`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod

from harness.checkpoint import open_checkpoint
from harness.comparison.findings import describe
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.stats import Stats
from harness.golden.golden import Golden, Update
from harness.text.folding import escaped, in_section, printable
from harness.text.shell import quoted

_MAX_SHOWN = 8  # names of settings
_MAX_TEXT = 60
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def render_table(
    fingerprint: Fingerprint, *, golden: Golden | None = None, stats: bool = False
) -> str:
    """Head lines, then one line a tensor: digest, dtype, shape, stats if asked for, and key.

    Columns have a width of their own, so that a new key moves no other line of a diff.
    """
    head = [*_head(fingerprint)]
    if golden is not None:
        head += _about(golden)
    return "\n".join([*head, "", *_rows(fingerprint, stats)])


def told(update: Update) -> str:
    """An entry of the history on one line, whatever the reason holds."""
    return f"{escaped(update.root[:16])}  {escaped(update.reason) or '(no reason given)'}"


def _head(fingerprint: Fingerprint) -> Iterator[str]:
    originals = [
        t for t in fingerprint.tensors.values() if t.alias_of is None and not t.dtype.is_value
    ]
    numel = sum(prod(tensor.shape) for tensor in originals)
    section = in_section(fingerprint.section)
    yield f"root       {fingerprint.root.hex()}"
    yield f"container  {escaped(fingerprint.container)}{section}"
    num_values = sum(tensor.dtype.is_value for tensor in fingerprint.tensors.values())
    yield (
        f"tensors    {len(fingerprint.tensors) - num_values:,}, {numel:,} numbers, "
        f"{_size(sum(tensor.nbytes for tensor in originals))}"
    )
    if num_values:
        yield f"values     {num_values:,} entries that are no tensors"
    for name, count in fingerprint.others:
        if count is None:
            yield f"not shown  {escaped(name)}"
        elif count:
            held = f"{count:,} tensor{'s' * (count != 1)}"
            yield f"not shown  {escaped(name)} ({held}): --section {quoted(name)}"
    values = [name for name, count in fingerprint.others if count == 0]
    if values:
        yield f"not shown  values: {_first_of(values)}: --all-sections"
    yield from (f"not read   {escaped(entry)}" for entry in fingerprint.unread)
    config = fingerprint.config or {}
    if config:
        yield f"settings   {len(config):,}: {_first_of(sorted(map(str, config)))}"
    members = sorted(fingerprint.members.items())
    yield from (f"beside     {escaped(name)}: {what}" for name, what in members[:_MAX_SHOWN])
    if len(members) > _MAX_SHOWN:
        yield f"beside     and {len(members) - _MAX_SHOWN:,} more files"


def _first_of(names: Sequence[str]) -> str:
    return escaped(", ".join(names[:_MAX_SHOWN])) + (", …" if len(names) > _MAX_SHOWN else "")


def _about(golden: Golden) -> Iterator[str]:
    """What a golden holds beside the table: where it is from, how it is compared, its size."""
    yield f"source     {escaped(golden.source) or 'none: recorded from memory'}"
    live = golden.live
    if live is not None and live.buffers is not None:
        yield f"buffers    {len(live.buffers.tensors):,} that are in no file"
    if live is not None and live.stages != ("file",):
        yield f"stages     {', '.join(live.stages)}"
        yield f"model      {escaped(live.target or 'as registered for the class in the config')}"
        named = (("config", live.config), ("inputs", live.inputs), ("base", live.base))
        yield from (f"{name:<10} {escaped(file)}" for name, file in named if file is not None)
    yield f"tolerance  {_tolerance(golden.fingerprint)}"
    if live is not None and live.outputs is not None:
        yield f"outputs    {len(live.outputs.tensors):,}, tolerance {_tolerance(live.outputs)}"
    yield f"file       {_space(golden)}"
    yield from (f"replaced   {told(update)}" for update in golden.history)


def _tolerance(part: Fingerprint) -> str:
    atol, rtol = part.tolerance
    return f"atol {atol:g}, rtol {rtol:g}"


def _space(golden: Golden) -> str:
    """The size of the golden's file, and what takes most of it."""
    with open_checkpoint(golden.path) as file:
        nbytes = Counter[str]()
        for key, column in file.tensors.items():
            nbytes[key.partition("/")[0]] += column.nbytes
    most = ", ".join(f"{escaped(name)} {_size(size)}" for name, size in nbytes.most_common(4))
    return f"{_size(nbytes.total())}: {most}"


def _rows(fingerprint: Fingerprint, with_stats: bool) -> Iterator[str]:
    yield _row("digest", "dtype", "shape", _STATS if with_stats else (), "key")
    for tensor in fingerprint.tensors.values():
        tied = f" = {printable(tensor.alias_of)}" if tensor.alias_of is not None else ""
        yield _row(
            (tensor.digest or b"").hex()[:16],
            tensor.dtype.name,
            "" if tensor.dtype.is_value else str(list(tensor.shape)),
            _numbers(tensor.stats) if with_stats else (),
            printable(tensor.key) + tied + _value(tensor),
        )


def _value(tensor: TensorFingerprint) -> str:
    """The text of a value, behind its key."""
    if not tensor.dtype.is_value:
        return ""
    text = escaped(describe(tensor))
    return f": {text if len(text) <= _MAX_TEXT else f'{text[: _MAX_TEXT - 1]}…'}"


def _row(digest: str, dtype: str, shape: str, numbers: Sequence[str], key: str) -> str:
    cells = [f"{digest:<16}", f"{dtype:<8}", f"{shape:<18}", *(f"{n:<12}" for n in numbers), key]
    return "  ".join(cells)


_STATS = ("min", "max", "mean", "std", "l2", "zeros", "nan", "inf")


def _numbers(stats: Stats | None) -> tuple[str, ...]:
    if stats is None:
        return ("-",) * len(_STATS)
    return (
        *(f"{value:.6g}" for value in (stats.min, stats.max, stats.mean, stats.std, stats.l2)),
        *(str(n) for n in (stats.num_zero, stats.num_nan, stats.num_posinf + stats.num_neginf)),
    )


def _size(nbytes: int) -> str:
    power = min(max(nbytes, 1).bit_length() - 1, 40) // 10
    return f"{nbytes / 1024**power:.{min(power, 1)}f} {_UNITS[power]}"
