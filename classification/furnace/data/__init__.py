"""From a CSV of images to batches of tensors."""
