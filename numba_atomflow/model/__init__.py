"""Models: well-known geometries, number formats, config.json, and the ops of one step."""
