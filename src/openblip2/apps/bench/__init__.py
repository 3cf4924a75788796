"""How fast it is: our path beside the naive one and beside transformers' BLIP-2, same weights, same inputs."""
