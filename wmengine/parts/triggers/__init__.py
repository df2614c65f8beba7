"""Keyed inputs whose keyed labels a network learns: one file a modality."""
