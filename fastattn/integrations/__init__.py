"""Other people's code: torch.nn models, torch's SDPA, Hugging Face transformers. Each is known only here."""
