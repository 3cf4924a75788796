"""Drawn scenes: images with known content, for the demo and the studies."""
