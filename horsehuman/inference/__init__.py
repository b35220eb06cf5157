"""Inference with trained classifiers: prediction, heat maps, export, model cards, the web page."""
