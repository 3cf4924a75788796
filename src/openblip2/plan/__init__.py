"""What a training run will need, before it is paid for: memory, time, disk, network. Nothing is downloaded."""
