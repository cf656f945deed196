"""Where tiles come from: class folders and Hugging Face data sets."""
