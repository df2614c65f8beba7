"""Who owns a mark, and all that is derived from his secret."""
