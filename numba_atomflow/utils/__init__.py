"""Small tools without knowledge of models or GPUs."""
