"""Which layer takes which settings, and AdamW for the parameters that are no LoRA factor."""
