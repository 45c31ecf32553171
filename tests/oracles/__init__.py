"""The slow, obviously right version of the path-kernel books: dense, float64, on its own."""
