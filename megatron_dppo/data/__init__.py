"""Prompts, rewards and the arithmetic task of the quickstart."""
