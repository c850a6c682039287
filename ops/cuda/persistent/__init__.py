"""The persistent decode kernel, one launch per token: docs/persistent-kernel.md."""
