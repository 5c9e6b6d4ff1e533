"""The text of one sample while it is generated: where it ends, and which part of it is final."""

from __future__ import annotations

from collections.abc import Callable

from dfcli.codecs import TextCodec


class StopText:
    """Passes text on up to a stop text, and holds back an end that may be the beginning of the stop text."""

    def __init__(self, stop: str | None) -> None:
        self._stop = stop or ""
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The further text that certainly comes before the stop text."""
        if not self._stop:
            return text
        self._held += text
        end = self._held.find(self._stop)
        self.found = end >= 0
        if not self.found:
            longest = min(len(self._stop) - 1, len(self._held))
            held = next((n for n in range(longest, 0, -1) if self._held.endswith(self._stop[:n])), 0)
            end = len(self._held) - held
        out, self._held = self._held[:end], self._held[end:]
        return out

    def finish(self) -> str:
        """The text that was held back, if the stop text never came."""
        return "" if self.found else self._held


class TextClip:
    """Sample `number`: ids in, pieces of text out to `on_text(number, piece)`. It begins with the prompt
    and ends at the id `end`, if that is not None, or before the text `stop`."""

    def __init__(
        self,
        number: int,
        codec: TextCodec,
        prompt: str,
        end: int | None,
        stop: str | None,
        on_text: Callable[[int, str], None],
    ) -> None:
        self.done = False
        self._number, self._end, self._on_text = number, end, on_text
        self._decoder = codec.decoder()
        self._stop = StopText(stop)
        self._pieces: list[str] = []
        self._put(prompt)

    def feed(self, ids: list[int]) -> int:
        """Takes further ids up to the end of the sample. Returns how many belong to it."""
        for count, token in enumerate(ids):
            if self.done:
                return count
            if token == self._end:
                self.done = True
            else:
                self._put(self._stop.feed(self._decoder.feed(token)))
                self.done = self._stop.found
        return len(ids)

    def finish(self) -> str:
        """Ends the sample and returns its whole text."""
        if not self._stop.found:
            self._put(self._stop.feed(self._decoder.finish()))
            self._put(self._stop.finish())
        self.done = True
        return "".join(self._pieces)

    def _put(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._on_text(self._number, text)
