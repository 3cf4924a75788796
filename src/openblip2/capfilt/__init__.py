"""CapFilt: captions from the web and from a captioner are ranked by how well they fit the image; the best are kept."""
