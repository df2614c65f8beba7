"""What can go wrong with the engine's files and with suspects; each message is one sentence with its mend."""


class WmengineError(Exception):
    """Base of the errors below; a plain wrong argument is a ValueError or a TypeError instead."""


class KeyFileError(WmengineError, ValueError):
    """A key file that is missing, readable by others, damaged, of another version or with another passphrase."""


class WatermarkError(WmengineError, ValueError):
    """A watermark (file) that is missing, damaged, of another version or scheme, or not made with the given key."""


class SuspectError(WmengineError):
    """A suspect that cannot be judged: not a model, no tensors to read, the wrong input shape, no usable answers."""

    def __init__(self, message: str) -> None:
        # Names inside a suspect's file are a stranger's: none may break the line or steer a terminal.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class ScanError(WmengineError):
    """A scan that cannot go on, through no suspect's fault; what it has finished is kept."""
