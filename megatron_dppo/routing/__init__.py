"""Recorded choices of routers: what is checked of them, and which rows a rank replays."""
