"""One persistent kernel per token: docs/persistent-kernel.md says how it works and what was tried."""
