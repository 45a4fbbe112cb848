"""What pytest loads first, installed as the module `checkpoint_harness_pytest`.

A project may have a package of its own that is called `harness`, which hides this one: pytest ends
with one line that says so.
"""

import sys

import pytest

try:
    from harness.pytest_plugin import *  # noqa: F403
except ImportError as error:
    other = getattr(sys.modules.get("harness"), "__file__", None)
    raise pytest.UsageError(
        f"checkpoint-harness: its pytest plugin cannot be imported ({error}); "
        + (f"{other} hides it: rename that package, " if other else "install it again, ")
        + "or run without the plugin: pytest -p no:checkpoint_harness"
    ) from None
