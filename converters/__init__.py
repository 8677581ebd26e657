"""Converts weights, in and out: `segment_anything` .pth, Hugging Face `SamModel`, and our own folders."""
