"""Search a folder of pictures by text or by another picture: `openblip2 index` and `openblip2 search`."""
