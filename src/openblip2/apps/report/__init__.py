"""Reports on runs: the demo's and the doctor's, each one HTML file that needs nothing beside it."""
