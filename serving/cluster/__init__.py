"""LLaVA Sieve on Ray Serve."""
