"""The customised policy as a Hugging Face model: which one, its streams and caches, its files."""
