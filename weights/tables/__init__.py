"""Names and configs of networks in files, one module a network: data only."""
