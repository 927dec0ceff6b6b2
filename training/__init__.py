"""Training of the shipped model nano, from its text to a Hugging Face directory (README.md)."""
