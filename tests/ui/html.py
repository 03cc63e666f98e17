"""Reads pages as a browser does: text, links, and tables."""

from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """The parsed page, with "-" for the minus sign. ValueError if tags are not nested correctly.

    Attributes:
        text: all text, with single spaces.
        links: (text, address) of every link.
        rows: the texts of the cells of each table row.
        tags: the names of all elements, in their order.
    """

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.rows, self.words, self._open = [], [], [], [], []
        self.feed(html)
        if self._open:
            raise ValueError(f"not closed: {self._open}")
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "a":
            self.links.append(["", dict(attrs).get("href", "")])
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        data = data.replace("\N{MINUS SIGN}", "-")
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())
        if "a" in self._open:
            self.links[-1][0] = " ".join(f"{self.links[-1][0]} {data}".split())

    def address(self, text):
        """Return the address of the link with that text."""
        return next(address for shown, address in self.links if shown == text)
