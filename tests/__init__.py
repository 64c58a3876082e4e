"""Tests in four tiers: unit, contract, integration, e2e."""
