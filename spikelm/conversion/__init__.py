"""Conversion of language models to spiking form: sources, key tables per family, plans, calibration."""
