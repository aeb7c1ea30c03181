"""CRISP: self-supervised pre-training of Vision Transformers with region-level consistency."""

__version__ = "0.1.0"
