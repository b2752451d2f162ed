"""Answers: the champions, asked for one customer or for all."""
