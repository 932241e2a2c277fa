"""Deterministic preparation of examples on the host, in NumPy: (example, *, options) -> example."""
