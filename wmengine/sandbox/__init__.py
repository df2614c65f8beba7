"""Strangers' models are looked at in processes that have nothing to lose: supervised, limited, and locked down.

`Supervisor` starts one template process with everything imported, and forks workers from it; a `Worker` serves one
client at a time, loses files, network and processes before it sees the first byte, and is killed when it is late.
"""

from wmengine.sandbox.lockdown import MECHANISMS, supported
from wmengine.sandbox.supervisor import Limits, Supervisor, TemplateGone, Worker, WorkerFailure

__all__ = ["MECHANISMS", "Limits", "Supervisor", "TemplateGone", "Worker", "WorkerFailure", "supported"]
