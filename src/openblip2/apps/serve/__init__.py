"""Serve trained runs as a web page and an OpenAI-compatible API (`openblip2 serve`)."""
