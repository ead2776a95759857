"""Evaluation: accuracy by logits or by features, quality of calibration images, and published numbers."""
