"""Recorded choices of routers: what is checked of them."""
