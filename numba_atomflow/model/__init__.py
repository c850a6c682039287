"""What a model is: well-known geometries and the operations of one step."""
