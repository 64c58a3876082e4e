"""Idem: enrol people by face, find those who enrol twice, authenticate by selfie, prove who did what."""
