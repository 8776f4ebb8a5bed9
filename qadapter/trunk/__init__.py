"""The frozen base: loading it, its head, running it without padding, what it is known by."""
