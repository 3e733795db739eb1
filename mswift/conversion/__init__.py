"""Exact, two-way conversion between Hugging Face safetensors checkpoints and megatron-core models: rules, shards, files, walks."""
