"""Attention in [B, L, H, D]: the definition, faster backends, and the one public interface."""
