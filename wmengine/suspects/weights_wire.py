"""What `engine_wire` serves, and weights besides: for workers that are to read them.

What reads graphs takes longer to import than all the rest, and makes the template twice as large, which every fork pays
for; a black-box mark needs none of it.
"""

from __future__ import annotations

from wmengine.suspects import engine_wire
from wmengine.suspects.engine_wire import serve
from wmengine.suspects.onnx_engine import preload_weights

__all__ = ["preload", "serve"]


def preload() -> None:
    """As `engine_wire.preload`, with what reads weights."""
    engine_wire.preload()
    preload_weights()
