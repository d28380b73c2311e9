"""Weights in and out: our training folders, the official code's TF1 files, Model Garden's."""
