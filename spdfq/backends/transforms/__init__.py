"""Steps that change the network but not its output in float, so that it quantizes better."""
