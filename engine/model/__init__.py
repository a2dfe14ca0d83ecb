"""Load, patch, head, attention, adapters: everything that touches a Hugging Face model."""
