"""A suspect behind a network address: `suspect.endpoint` makes it, from options that are fixed before it is asked."""
