"""What presets are made of: sources of marks, symbols, statistics, training. Each part owns its fields and its checks."""
