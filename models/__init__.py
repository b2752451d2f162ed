"""Fit, score, choose: plain arrays and frames in, answers out. No HTTP and no Feast here."""
