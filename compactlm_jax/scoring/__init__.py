"""Scores of predictions: host-side NumPy, scikit-learn and SciPy; no JAX."""
