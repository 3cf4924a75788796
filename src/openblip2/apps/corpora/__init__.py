"""Images that packages contain: easy-VQA, stamps, drawings, emoji and furniture, in groups of near-duplicates."""
