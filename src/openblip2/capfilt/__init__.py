"""CapFilt: the web's captions and a captioner's, ranked by a model that sees the picture; the best are kept."""
