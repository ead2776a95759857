"""Steps that correct weights by least squares, without gradients."""
