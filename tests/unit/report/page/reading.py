"""HTML as tests look at it."""

from __future__ import annotations

from html.parser import HTMLParser


class Document(HTMLParser):
    """The elements of a document in order, each with its attributes and the text in it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[list[str]] = []
        self._names: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.elements.append((tag, dict(attrs), texts))
        if tag not in {"meta", "input", "br"}:
            self._open.append(texts)
            self._names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._names, f"</{tag}> ends nothing"
        assert self._names[-1] == tag, f"</{tag}> ends <{self._names[-1]}>"
        self._names.pop()
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self._open:
            texts.append(data)

    def find(self, tag: str, **attributes: str) -> list[str]:
        """The texts of all elements with these attributes."""
        return [
            " ".join("".join(texts).split())
            for name, found, texts in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]

    def raw(self, tag: str, **attributes: str) -> list[str]:
        """As `find`, with every blank and line break."""
        return [
            "".join(texts)
            for name, found, texts in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]
