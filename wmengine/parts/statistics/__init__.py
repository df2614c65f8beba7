"""What observed symbols are worth: one file a statistic, and the tails that they stand on."""
