"""How the shipped nano model was made: text -> tokenizer -> training -> Hugging Face directory (see README.md)."""
