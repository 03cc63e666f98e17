"""Pages of which parts are written by a program: each such block between two HTML comments."""

from collections.abc import Mapping

__all__ = ["with_blocks"]


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with these blocks made anew, by name. ValueError where one has no place."""
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page has no block {name!r}: it stands between {begin} and {end}")
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{block}\n{end}{tail}"
    return page
