"""The live side: build a model, load, save, reload and run it, and compare each with a golden.

The only part, with `harness.nest`, that imports torch and Lightning. It runs the user's model code,
named by the user, by the golden or by the closed registry, never by the checkpoint.
"""

from __future__ import annotations

from importlib.util import find_spec

from harness.errors import NotInstalled


def not_installed(*packages: str) -> NotInstalled | None:
    """The error to raise where a package that runs models is missing; imports none of them."""
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return None
    return NotInstalled(
        f"not installed: {', '.join(missing)}; models, state dicts, runs of several ranks and the "
        "stages after --file need it",
        # Its callback alone takes it: whoever uses that has it.
        hint="pip install transformers"
        if missing == ["transformers"]
        else "pip install 'checkpoint-harness[live]'",
    )


if error := not_installed("torch"):
    raise error
