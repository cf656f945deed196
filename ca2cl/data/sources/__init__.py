"""Sources of tiles: class folders and Hugging Face data sets."""
