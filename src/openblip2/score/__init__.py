"""`openblip2 evaluate`: scores of a run, each with the protocol by which it was reached."""
