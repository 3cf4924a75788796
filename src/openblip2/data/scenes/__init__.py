"""Drawn scenes: pictures of which everything is known."""
