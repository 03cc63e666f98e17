"""Replace the generated blocks of a Markdown page. Each lies between two HTML comments."""

from collections.abc import Mapping

__all__ = ["with_blocks"]


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with these blocks replaced, by name, with a blank line around each.

    mdformat leaves such blocks unchanged. Raises ValueError if the page has no place for a block.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page has no block {name!r}; expected: {begin} and {end}")
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n\n{block}\n\n{end}{tail}"
    return page
