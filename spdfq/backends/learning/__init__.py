"""Steps that optimise weights, roundings or scales by gradient descent."""
