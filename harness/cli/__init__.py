"""The command line: `harness.cli:main` is its entry point."""

from harness.cli.commands import main

__all__ = ["main"]
