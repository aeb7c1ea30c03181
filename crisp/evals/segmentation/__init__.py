"""Semantic segmentation by frozen patch features: nearest neighbours and logistic regression."""
