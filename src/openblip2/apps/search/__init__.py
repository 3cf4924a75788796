"""Finding pictures of a folder by text or by another picture: `openblip2 index` and `openblip2 search`."""
