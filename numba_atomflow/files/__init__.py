"""Files of users: reading within limits, writing whole files, noticing changes."""
