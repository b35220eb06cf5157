"""Read, split, augment and batch labelled images; nothing here imports a model."""
