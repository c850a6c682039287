"""Files: reading untrusted input, atomic writes, detection of changes."""
