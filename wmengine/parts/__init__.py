"""What presets are made of: sources of marks, symbols, statistics and training, each the owner of its fields."""
