"""Other people's tools on our models. Each needs an extra of its own."""
