"""The project that a golden belongs to: its folder, and what its pyproject.toml says.

In: a path. Out: the folder with `.git` or `pyproject.toml` in or above it, and the folders of
`[tool.harness] root`, below which checkpoints outside of the project lie.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.sources.paths import is_there
from harness.errors import UsageError

# Folders in place of `[tool.harness] root`, separated as in PATH.
ROOT_VARIABLE = "HARNESS_ROOT"


def project_of(folder: Path) -> Path:
    """The innermost folder with a project in it; without one, the folder that `golden/` is in."""
    for candidate in (folder, *folder.parents):
        if any(is_there(candidate / name) for name in (".git", "pyproject.toml")):
            return candidate
    return folder.parent if folder.name == "golden" else folder


def settings_of(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The nearest pyproject.toml's folder, and its `[tool.harness]`; UsageError for bad TOML."""
    for candidate in (folder, *folder.parents):
        path = candidate / "pyproject.toml"
        if path.is_file():
            try:
                project = tomllib.loads(path.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{path}: not valid TOML: {error}", hint="fix the file") from error
            settings = project.get("tool", {}).get("harness", {})
            return candidate, settings if isinstance(settings, dict) else {}
    return folder, {}


def roots_of(folder: Path) -> list[Path]:
    """The folders that checkpoints outside of a project are below, without links."""
    given = os.environ.get(ROOT_VARIABLE)
    if given is not None:
        base, roots = Path.cwd(), given.split(os.pathsep)
    else:
        base, settings = settings_of(folder)
        said = settings.get("root", [])
        roots = [said] if isinstance(said, str) else said
        if not isinstance(roots, list) or not all(isinstance(root, str) for root in roots):
            raise UsageError(
                f"{base / 'pyproject.toml'}: [tool.harness] root is {said!r}",
                hint='give a folder, or a list of folders: root = "../checkpoints"',
            )
    return [Path(os.path.realpath(base / Path(root).expanduser())) for root in roots if root]
