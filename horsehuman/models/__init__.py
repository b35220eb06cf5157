"""The two classifiers; they know no data but tensors."""
