"""Server-sent events, as the WHATWG's HTML standard has them parsed (section 9.2).

Only data is of interest here: names of events, their numbers and comments are read over.
"""

from __future__ import annotations

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventStream:
    """Takes a stream apart that comes in pieces cut anywhere, inside characters and line ends too.

    An event that its empty line has not ended is none.
    """

    __slots__ = ("_data", "_is_at_start", "_is_between_events", "_rest", "_skips_line_feed")

    def __init__(self) -> None:
        self._rest = b""
        """The begin of a line whose end has not come."""
        self._data: list[bytes] = []
        """The data lines of an event whose end has not come."""
        self._skips_line_feed = False
        """The last byte was a carriage return: a line feed that follows belongs to it."""
        self._is_at_start = True
        self._is_between_events = True
        """Nothing is pending: what comes begins a line, and an event."""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that `piece` completes, in order; often none, or several.

        Several data lines of one event are joined by line feeds.
        """
        # What most servers send, most of the time: a whole event of a single data line. Should its
        # last line end go on in the next piece, that is one more empty line, which says nothing.
        lines = piece.splitlines()
        if len(lines) == 2 and not lines[1] and self._is_between_events:
            line = lines[0]
            if line[:6] == b"data: ":
                self._is_at_start = False
                return [line[6:]]
        return self._feed_anything(piece)

    def _feed_anything(self, piece: bytes) -> list[bytes]:
        if not piece:
            return []
        if self._skips_line_feed and piece.startswith(b"\n"):
            piece = piece[1:]
        self._skips_line_feed = piece.endswith(b"\r")
        text = self._rest + piece
        if self._is_at_start:
            if len(text) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(text):
                self._rest = text  # that may become one
                self._is_between_events = False
                return []
            text = text.removeprefix(_BYTE_ORDER_MARK)
            self._is_at_start = False
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()
        events = self._read_lines(lines)
        self._is_between_events = not (self._rest or self._data or self._skips_line_feed)
        return events

    def _read_lines(self, lines: list[bytes]) -> list[bytes]:
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data.clear()
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
        return events
