"""The command line: `harness.cli:main` is its entry point."""

from harness.cli.entry import main as main
