"""Speculative decoding: tokens proposed by a drafter, checked several at a time in one step of the model."""
