"""Speed and memory of ours, of a naive implementation and of transformers' BLIP-2, with equal weights and inputs."""
