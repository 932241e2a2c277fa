"""From a trained network to predictions for whole cases, and to files."""
