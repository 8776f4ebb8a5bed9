"""A server of the customised policy: OpenAI's API, a strength for each request, and a page."""
