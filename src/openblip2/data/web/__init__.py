"""Shards: tar files of images with captions, read in an order that can start anywhere."""
