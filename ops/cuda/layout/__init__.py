"""The order of prepacked weights in device memory."""
