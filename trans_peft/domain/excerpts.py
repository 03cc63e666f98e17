"""Excerpts of untrusted text for error messages, which must stay short whatever the text is."""

__all__ = ["LONGEST_EXCERPT", "excerpt"]

LONGEST_EXCERPT = 200
"""Characters of a text that an error message quotes."""


def excerpt(text: str, longest: int = LONGEST_EXCERPT) -> str:
    """Return a text as `repr` writes it, cut after `longest` characters with its length.

    >>> excerpt("abcdef", 3)
    "'abc'... (6 characters)"
    """
    return repr(text) if len(text) <= longest else f"{text[:longest]!r}... ({len(text)} characters)"
