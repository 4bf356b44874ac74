"""Options, timing, memory and training steps that the programs in `bench` share."""
