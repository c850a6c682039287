"""Communication between CTAs."""
