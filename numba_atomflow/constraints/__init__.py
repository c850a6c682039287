"""Constraints on replies: JSON schemas, regular expressions and grammars."""
