"""Evaluation of edited images: features, metrics, and the benchmark."""
