"""`openblip2 serve`: a page and an API before a trained model, and the process that runs it."""
