"""Share options, timing, memory measurement and training steps between the programs in `bench`."""
