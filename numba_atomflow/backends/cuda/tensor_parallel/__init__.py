"""One model on several GPUs: each, a rank, has a part of every projection's rows, and of the heads."""
