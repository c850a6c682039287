"""Other tools with models of this engine; each module needs the extra that it names."""
