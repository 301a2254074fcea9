"""Name tables, one module per checkpoint layout: data only."""
