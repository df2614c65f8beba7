"""Reports: evidence that people can look at, as one HTML file that needs nothing beside it."""
