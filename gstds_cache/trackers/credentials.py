"""Takes credentials out of texts that are logged or shown."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SHORTEST = 6  # characters of a value that is looked for: shorter ones stand in any text

_NAMES = "token|secret|password|passwd|api_?key|access_?key|credential|signature"
_SECRET_NAME = re.compile(f"{_NAMES}|auth$", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^\s'\"?#]+(?=@)")  # to the last @: a password may hold others, and slashes
_QUERY = re.compile(rf"([?&;](?:[^=&\s]*(?:{_NAMES}|auth(?!or))[^=&\s]*|sig)=)[^&\s'\"]+", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """``text`` with ``***`` for what is secret.

    That is: user and password in a URL; query values whose name says so (``token=``); and the value of each environment
    variable whose name says so (``WANDB_API_KEY``, ``AWS_SECRET_ACCESS_KEY``), wherever it stands.
    """
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return text
