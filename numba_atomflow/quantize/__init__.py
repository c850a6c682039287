"""Ways to turn weights into FP8 codes and group scales."""
