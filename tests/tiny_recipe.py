"""A recipe on the bundled ViT as text, all but its images."""

NO_IMAGES = """
[model]
name = "bundled:vit_fmnist"
[quantization]
placement = "matmul_inputs"
weights = { type = "uniform", bits = 4, granularity = "channel" }
activations = { type = "uniform", bits = 4 }
softmax = { type = "log2", bits = 4 }
[[quantization.steps]]
type = "calibrate"
observer = "minmax"
weight_observer = "minmax"
[evaluation]
dataset = "fashion_mnist"
"""
