"""Exits inside the image: cheap branches where they do, deeper exits only on the tiles that need them."""
