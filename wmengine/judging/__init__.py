"""Who asks a suspect what, what its answers are worth, and the one place that says owned."""
