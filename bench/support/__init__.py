"""Options, timing, memory and training steps for the programs in `bench`."""
