"""Where bytes live: the mapped checkpoint, views of it, and the key/value cache."""
