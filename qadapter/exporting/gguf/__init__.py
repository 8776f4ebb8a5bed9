"""A merged checkpoint as one GGUF file: what llama.cpp and Ollama run."""
