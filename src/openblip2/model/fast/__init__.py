"""Code that makes a step faster or larger without changing its result."""
