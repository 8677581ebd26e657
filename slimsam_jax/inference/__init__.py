"""Predicts masks for images and prompts."""
