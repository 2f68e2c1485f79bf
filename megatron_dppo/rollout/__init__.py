"""Rollouts: trajectories, the engines that sample them, and how an engine gets new weights."""
