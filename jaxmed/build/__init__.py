"""From configs to objects and runs: the only room that knows what a ConfigDict is."""
