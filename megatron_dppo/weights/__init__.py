"""Weights in the coordinates of the Hugging Face checkpoint: which box of which tensor each rank holds."""
