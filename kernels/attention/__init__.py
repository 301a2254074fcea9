"""Attention in [B, L, H, D]: the definition, the fast eager form, and the one public interface."""
