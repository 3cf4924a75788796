"""Reports on runs: the demo's and the doctor's, each a self-contained HTML file."""
