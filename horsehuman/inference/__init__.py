"""Using trained classifiers."""
