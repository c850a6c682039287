"""Memory: mapped files, views, the memory plan, arenas, and the KV cache."""
