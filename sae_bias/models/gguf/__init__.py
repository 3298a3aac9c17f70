"""GGUF files (llama.cpp) as models."""
