"""Fine-tuned adapters (LoRA) beside a model's weights: read, kept in memory or streamed, never merged."""
