"""Serving: the OpenAI protocol over HTTP, and a chat page."""
