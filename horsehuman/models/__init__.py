"""The networks of the two classifiers, their pretrained weights, calibration and checkpoints."""
