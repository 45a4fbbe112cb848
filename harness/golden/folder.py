"""The goldens of a folder, and the names that checkpoints have there.

In: folders, and paths of checkpoints. Out: goldens in natural order (step-1000 after step-200),
those of tests apart; the name under which a checkpoint's golden is kept.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness.checkpoint.sources.paths import AnyPath
from harness.golden.golden import SUFFIX

_SUFFIXES = (".index.json", ".safetensors", ".nemo", ".ckpt", ".pth", ".pt", ".bin", ".gz")
# Names that every run and every model has: by themselves they do not tell checkpoints apart.
_COMMON_NAME = re.compile(
    r"((adapter_|pytorch_|diffusion_pytorch_)?model|weights|consolidated|best|last|final|latest"
    r"|(checkpoints?|ckpt|step|epoch|iter|global_?step)[-_=]?\d*([-_=.]\w+)*)",
    re.IGNORECASE,
)


def goldens_below(folder: Path) -> tuple[list[Path], int]:
    """Find the goldens in a folder and the folders below it, hidden ones left out.

    Beside those to verify: how many belong to tests, which verify them by themselves.
    """
    found = [
        path.relative_to(folder)
        for path in folder.rglob(f"*{SUFFIX}")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    # As pytest collects the modules of tests, whose names their folders have.
    is_test = re.compile(r"test_.*|.*_test").fullmatch
    own = sorted((p for p in found if not any(map(is_test, p.parts[:-1]))), key=natural)
    return [folder / path for path in own], len(found) - len(own)


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """The key that sorts step-1000 after step-200."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def names_of(checkpoint: AnyPath) -> list[str]:
    """The names of a checkpoint's golden, the default first; each later one has one folder more.

    A name that says nothing, such as `model.safetensors` or `checkpoint-500`, begins with that of
    its folder.
    """
    if isinstance(checkpoint, Path):
        parent = checkpoint.absolute().parent
        # As it was typed where it is not below the current folder.
        below = parent.relative_to(Path.cwd()) if parent.is_relative_to(Path.cwd()) else parent
        folders = [part for part in below.parts if part not in ("..", parent.anchor)]
    else:
        path = str(checkpoint).partition("://")[2]
        folders = [part for part in path.split("/")[:-1] if part]
    name = checkpoint.name
    if isinstance(checkpoint, Path) and name in ("", ".."):
        name = checkpoint.resolve().name
    for suffix in (*_SUFFIXES, *_SUFFIXES):
        name = name.removesuffix(suffix)
    name = re.sub(r"[_-]?\*", "", name)  # of a glob
    parts = [name or checkpoint.name]
    names = [parts[0]]
    for folder in reversed(folders):
        if _COMMON_NAME.fullmatch(parts[0]):
            names.clear()  # a longer name is the default
        parts.insert(0, folder)
        names.append("-".join(parts))
    return [f"{name}{SUFFIX}" for name in names]
