"""Compares planning strategies on published head profiles, by the cost model."""
