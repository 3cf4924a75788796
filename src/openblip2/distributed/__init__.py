"""Several processes that train one model: what they send each other, how they start and end, sharded weights."""
