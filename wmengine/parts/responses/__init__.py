"""Bits in how a network answers ordinary inputs: `response`."""
