"""What is built on the package: each folder can be removed without the rest noticing, except for its commands."""
