"""The command line, a file a command; `main` runs one."""

from wmengine.cli import attack, bench, demo, emmark, info, keygen, scan, schemes, verify
from wmengine.cli.app import main

__all__ = ["attack", "bench", "demo", "emmark", "info", "keygen", "main", "scan", "schemes", "verify"]
