"""Interventions on features and directions, and the engines that run them."""
