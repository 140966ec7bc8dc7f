"""kvthrift inside Hugging Face transformers: the only code here that knows that library."""
