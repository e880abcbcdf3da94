"""The query part of the names of data sets and models: ``name?key=value&key=value``."""

from __future__ import annotations

from urllib.parse import parse_qsl

from gstds_cache.errors import UsageError


def split_query(what: str, uri: str) -> tuple[str, dict[str, str]]:
    """Split a name from its query parameters.

    Args:
        what: What is named, in errors, e.g. ``model``.
        uri: The name as the user gave it.

    Returns:
        What stands before the first ``?``, and the parameters.

    Raises:
        UsageError: The query is no list of name=value pairs, or names one twice.
    """
    base, _, query = uri.partition("?")
    try:
        # A plus sign is a plus sign in a path; that it means a space is a rule of web forms.
        pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise UsageError(
            f"{what} {uri!r}: got the query {query!r}, expected name=value pairs joined by '&'",
            hint=f"quote the whole {what} in a shell, where '&' and '?' mean something else",
        ) from None
    params = dict(pairs)
    if len(params) != len(pairs):
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        raise UsageError(f"{what} {uri!r}: query parameter given more than once: {', '.join(twice)}")
    return base, params
