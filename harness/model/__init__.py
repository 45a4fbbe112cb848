"""The live side: build a model, load, save, reload and run it, and compare each with a golden.

The only part, with `harness.nest`, that imports torch and Lightning. It runs the user's model code,
named by the user, by the golden or by the closed registry, never by the checkpoint.
"""

from __future__ import annotations
