"""How good classifiers are, and what is wrong with pictures."""
