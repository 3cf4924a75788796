"""Frozen features kept on the disk."""
