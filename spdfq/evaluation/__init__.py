"""How well a model works: accuracy by logits or by features, quality of images, and published numbers."""
