"""Processes as /proc shows them: whose child each is, and what has become of it."""

import os


def children(parent):
    """Processes below one, with their states."""
    found = {}
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        state = _state_and_parent(process)
        if state is not None and int(state[1]) == parent:
            found[process] = state[0]
    return found


def template_of(worker):
    """The process that a sandboxed worker was forked from."""
    return int(_state_and_parent(worker.process)[1])


def _state_and_parent(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[:2]
    except OSError:
        return None
