"""Passes over the exporter's graph, after which runtimes find an integer kernel for every quantized product."""
