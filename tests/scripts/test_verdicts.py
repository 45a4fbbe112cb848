"""scripts/verdicts, which takes minutes: it fits the product that it judges."""

from __future__ import annotations

import runpy

from tests.conftest import REPOSITORY


def test_it_finds_what_it_imports_of_the_product() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "verdicts"), run_name="imported")
    assert {"judge_weights", "judge_outputs"} <= script.keys()
