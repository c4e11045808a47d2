"""Reads an HTML page that the project wrote."""

import html.parser

VOID = ("meta", "img", "br", "input")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, texts, rows of tables, scripts; complains of tags left open."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.scripts, self._open = [], [], [], []
        self.rows: list[list[str]] = []
        self.feed(path.read_text())
        assert not self._open

    @property
    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.rows += [[]] if tag == "tr" else []
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif (text := " ".join(data.split())) and self._open[-1] != "style":
            self.texts.append(text)
            if {"td", "th"} & set(self._open):
                self.rows[-1].append(text)
