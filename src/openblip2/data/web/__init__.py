"""Data of web scale: tar files of pictures with captions, read in an order that can be begun anywhere."""
