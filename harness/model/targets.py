"""Which code builds the model: a target `package.module:Name`, from the user or the registry.

In: a target, or the class name that a NeMo config carries. Out: a class or factory. Refused: names
outside of the registry (a checkpoint must not choose what is imported), targets that do not import.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from harness.checkpoint.tensors import Checkpoint
from harness.errors import HarnessError, ModelError
from harness.golden.project import settings_of

_PACKAGE = Path(__file__).parent.parent
# NeMo's class names, and the local classes that stand for them.
REGISTRY: Mapping[str, str] = {
    "EncDecDenoiseMaskedTokenPredModel": "harness.nest:EncDecDenoiseMaskedTokenPredModel",
}


@contextmanager
def user_code(doing: str, hint: str, brief: Callable[[str], str] = str) -> Iterator[None]:
    """Turn whatever the code under test raises into a ModelError that says what was being done.

    `sys.exit` too: its 0 would say that all is well, its 1 that a checkpoint differs. What it
    prints goes to stderr: stdout is for the report.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except HarnessError:
        raise
    except (Exception, SystemExit) as error:
        where = _where(error)
        raise ModelError(
            f"{doing} failed: {type(error).__name__}: {brief(str(error))}{where}", hint=hint
        ) from error


def _where(error: BaseException) -> str:
    """The innermost line of the traceback that is in no library: where the user's code failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not _is_library(f.filename)]
    if not own:
        return ""
    path = Path(own[-1].filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
    return f" ({shown}:{own[-1].lineno}, in {own[-1].name})"


def _is_library(file: str) -> bool:
    libraries = (_PACKAGE, sysconfig.get_path("stdlib"))
    return file.startswith("<") or any(Path(file).is_relative_to(folder) for folder in libraries)


def resolve(target: str) -> Callable[..., Any]:
    """Import a target; the current folder is importable, as with `python -m`."""
    module_name, colon, name = target.partition(":")
    if module_name.endswith(".py"):
        module = ".".join(Path(module_name).with_suffix("").parts)
        raise ModelError(
            f"--model {target}: {module_name} is a file, not a module",
            hint=f"--model {module}:{name or 'ClassOrFactory'}",
        )
    if not (colon and _is_dotted(module_name) and _is_dotted(name)):
        before, _, last = target.rpartition(".")
        is_name = not colon and _is_dotted(target) and before
        raise ModelError(
            f"--model {target}: not of the form package.module:ClassOrFactory",
            hint=f"--model {before}:{last}"
            if is_name
            else "for instance --model my_package.models:build_model",
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # user code: anything may be raised
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        )
        what = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ModelError(
            f"--model {target}: {module_name} cannot be imported: {what}{error}",
            hint="install it, run from the folder that holds it, or give another class with --model"
            if missing
            else f"see its traceback: python -c 'import {module_name}'",
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), 1)
            raise ModelError(
                f"--model {target}: {module_name} has no {name}",
                hint=f"did you mean --model {target.removesuffix(part)}{close[0]}?"
                if close and target.endswith(part)
                else f"see what it has: python -m pydoc {module_name}",
            )
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(
            f"--model {target}: is a {type(found).__name__}, not a class or function",
            hint="name a class, or a function without arguments that returns the model",
        )
    return found  # type: ignore[no-any-return]


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def registered(config: Mapping[str, Any] | None, *, start: Path | None = None) -> str | None:
    """The target that the registry has for a NeMo config; None for a config that names no class.

    A project adds its own under `[tool.harness.models]` of its pyproject.toml. Raises ModelError
    for a class that nobody registered.
    """
    nemo_class = _nemo_class(config)
    if nemo_class is None:
        return None
    known = {**REGISTRY, **_project_models(start or Path.cwd())}
    name = nemo_class.rpartition(".")[2]
    if name not in known:
        raise ModelError(
            f"the checkpoint is of the class {nemo_class}, which is not in the registry "
            f"({', '.join(sorted(known))})",
            hint=f'give --model package.module:Class, or add {name} = "package.module:Class" to '
            "[tool.harness.models] in pyproject.toml",
        )
    return known[name]


def check_named_classes(checkpoint: Checkpoint, target: str) -> None:
    """Raise ModelError for a config that has a class import what nobody but the file has named.

    NeMo's own `restore_from` imports what `target` and `_target_` say. The local classes read them
    as text.
    """
    root = target.partition(":")[0].partition(".")[0]
    if root == "harness":
        return
    known = {root, "nemo", "torch"}
    strange = {name for name in _named_in(checkpoint.config) if name.partition(".")[0] not in known}
    if strange:
        raise ModelError(
            f"{checkpoint.name}: loading it would import {', '.join(sorted(strange))[:500]}",
            hint="if you trust the file, load it with --trust-checkpoint",
        )


def _named_in(config: Any) -> Iterator[str]:
    """The classes that a NeMo config names: dotted names under `target` and `_target_`."""
    if isinstance(config, Mapping):
        for key, child in config.items():
            if key in ("target", "_target_") and isinstance(child, str) and "." in child:
                yield child
            yield from _named_in(child)
    elif isinstance(config, (list, tuple)):
        for child in config:
            yield from _named_in(child)


def _nemo_class(config: Mapping[str, Any] | None) -> str | None:
    """The class that NeMo wrote: at the top of a .nemo's config, under `cfg` in a .ckpt's."""
    for level in (config, (config or {}).get("cfg")):
        target = level.get("target") if isinstance(level, Mapping) else None
        if isinstance(target, str):
            return target
    return None


def _project_models(start: Path) -> dict[str, str]:
    models = settings_of(start)[1].get("models", {})
    return {str(name): str(target) for name, target in models.items()}
