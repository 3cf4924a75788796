"""Real pictures that ordinary packages carry, in groups of look-alikes."""
