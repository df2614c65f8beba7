"""What can go wrong with the engine's files and with suspects; each message is one sentence with its mend."""

from __future__ import annotations

MORE_MEMORY = "needs more memory than it may have, and --memory (limits=) gives it more"


class WmengineError(Exception):
    """Base of the errors below; a plain wrong argument is a ValueError or a TypeError instead."""


class KeyFileError(WmengineError, ValueError):
    """A key file that is missing, readable by others, damaged, of another version or with another passphrase."""


class WatermarkError(WmengineError, ValueError):
    """A watermark (file) that is missing, damaged, of another version or scheme, or not made with the given key."""


class SuspectError(WmengineError):
    """A suspect that cannot be judged: not a model, no tensors to read, the wrong input shape, no usable answers."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OtherTask(SuspectError):
    """It takes other inputs than the watermark's, or answers no classes of its task, or nothing at all: a model of
    another task, a checkpoint, or a copy made to look like one."""


class SuspectGone(SuspectError):
    """It can be asked nothing more: the process that it ran in has ended."""


class ScanError(WmengineError):
    """A scan that cannot go on, through no suspect's fault; what it has finished is kept."""


def printable(text: str, limit: int = 1000) -> str:
    """A stranger's text on one line of at most `limit` characters, none of which steers a terminal or is no Unicode."""
    text = text[: limit + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
