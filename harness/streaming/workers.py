"""Who does the work, and who watches it: made once by a verb, handed down to what reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Who watches bytes that are read, from any thread."""

    def expect(self, nbytes: int) -> None:
        """So many more will be read."""

    def advance(self, nbytes: int) -> None:
        """So many more were read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """`jobs` threads, by default one for each core allowed, watched by `progress`."""

    jobs: int | None = None
    progress: Progress | None = None

    def expect(self, nbytes: int) -> None:
        """Announce bytes that will be read."""
        if self.progress is not None:
            self.progress.expect(nbytes)

    def advance(self, nbytes: int) -> None:
        """Report bytes that were read."""
        if self.progress is not None:
            self.progress.advance(nbytes)


ALL_CORES = Workers()
