"""URLs in messages: without passwords and signatures."""

from __future__ import annotations

import re

# What stands before an @ is a container here, and a person or a password everywhere else.
_ADDRESSED = ("abfs", "abfss", "az", "adl", "hf")
_ANY_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def without_secrets(url: str) -> str:
    """A URL without its query and fragment, and without who asks."""
    scheme, _, rest = url.partition("://")
    rest = rest.partition("?")[0]
    if scheme in ("http", "https"):
        rest = rest.partition("#")[0]
    netloc, slash, path = rest.partition("/")
    person, at, host = netloc.rpartition("@")
    if at and scheme in _ADDRESSED:
        netloc = f"{person.partition(':')[0]}@{host}"
    elif at:
        netloc = host
    return f"{scheme}://{netloc}{slash}{path}"


def redacted(text: str) -> str:
    """A text in which every URL stands without its secrets."""
    return _ANY_URL.sub(lambda found: without_secrets(found[0]), text)
