"""Evaluate and compare classifiers, and audit image sets."""
