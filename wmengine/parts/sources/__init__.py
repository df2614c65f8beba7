"""Where marks live in a network that shows its inside."""
